"""Decoding steps in bfloat16 by two C functions (`thin.c`), on processors that multiply tiles of it (Xeon since 2023).

With few rows a step is the reading of the weights, and small PyTorch calls take longer than they compute. The functions read
the weights as they lie and join what lies between two products; under mixed precision the residual stream stays in float32.
They are built once, with the C compiler of the machine; where there is none the decoder in PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from opd_lightning.compiling import FLOAT, INT, LONG, POINTER, built
from opd_lightning.samplers.decoder import HEAD_NORMS, Decoder, Norm, Weights
from opd_lightning.samplers.linear import Linear

SOURCE = Path(__file__).with_name("thin.c")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "amx-tile", "amx-bf16", "fma")
STORE, ADD, GATE = 0, 1, 2
"""What `opd_linear` does with its product."""


def supported() -> bool:
    """Whether this processor multiplies tiles (AMX), and the system lets this process do so."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and bool(torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions for bfloat16, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, FEATURES) if supported() else None
    if found is not None:
        linear: list[Any] = [POINTER, LONG, LONG, POINTER, FLOAT, POINTER, POINTER, LONG, POINTER, INT, INT, POINTER, INT]
        attend: list[Any] = [POINTER, *[LONG] * 4, *[POINTER] * 4, FLOAT, INT, POINTER, LONG, POINTER, FLOAT, POINTER, INT]
        found.opd_linear.argtypes, found.opd_linear.restype = linear, None
        found.opd_attend.argtypes, found.opd_attend.restype = attend, None
    return found


def computes(base: Any, dtype: torch.dtype, vocab: int) -> bool:
    """Whether a model of a known architecture has the shapes and the precision that the functions take.

    Args:
        base: a Hugging Face causal language model.
        dtype: of its products.
        vocab: rows of the head that carry a token.
    """
    config, attention, stream = base.config, base.model.layers[0].self_attn, base.model.embed_tokens.weight
    if dtype != torch.bfloat16 or stream.dtype not in (dtype, torch.float32) or not regular(base):
        return False
    sizes = (config.hidden_size, config.intermediate_size, attention.head_dim)
    fit = all(size % 32 == 0 for size in sizes) and attention.head_dim <= 256 and vocab >= 16
    return fit and stream.is_cpu and library() is not None


def regular(base: Any) -> bool:
    """Whether gates are SiLU and all norms have the precision of the residual stream."""
    stream = base.model.embed_tokens.weight.dtype
    return base.config.hidden_act in ("silu", "swish") and all(norm.weight.dtype == stream for norm in norms_of(base))


def norms_of(base: Any) -> Iterator[Any]:
    """All norms of a model of a known architecture."""
    yield base.model.norm
    for layer in base.model.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (getattr(layer.self_attn, name) for name in HEAD_NORMS if hasattr(layer.self_attn, name))


class CompiledDecoder(Decoder):
    """The decoder whose steps are C functions. Prompts are read by PyTorch, which is as fast with many tokens."""

    packs = False

    def __init__(self, base: Any, weights: Weights, rows: int, prompt: int, length: int) -> None:
        super().__init__(base, weights, rows, prompt, length)
        found = library()
        assert found is not None
        self.c, self.threads = found, torch.get_num_threads()
        widest = max(base.config.hidden_size, base.config.intermediate_size, self.queries * self.size)
        self.space = torch.empty((rows + 15) // 16 * 16 * (widest + 2), dtype=weights.dtype)
        self.turns = self.cos.float().contiguous(), self.sin.float().contiguous()
        self.wide = int(weights.embedding.dtype == torch.float32)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self._reserve(max(self.lengths) + 1)
        x = F.embedding(ids, self.weights.embedding)
        cos, sin = (turn[self.places] for turn in self.turns)
        for layer, cache in zip(self.weights.layers, self.cached, strict=True):
            heads = self._linear(x, layer.qkv, layer.before_attention)
            mixed = self._attend(heads, layer.head_norms, cos, sin, cache)
            self._linear(mixed, layer.out, onto=x)
            if layer.gate_up.adapter is None:
                inside = self._linear(x, layer.gate_up, layer.before_mlp, mode=GATE)
            else:
                gate, up = self._linear(x, layer.gate_up, layer.before_mlp).chunk(2, -1)
                inside = layer.act(gate) * up
            self._linear(inside, layer.down, onto=x)
        self.lengths = [n + 1 for n in self.lengths]
        self.places = self.places + 1
        return self._linear(x, self.weights.head, self.weights.norm)

    def _linear(
        self, x: Tensor, layer: Linear, norm: Norm | None = None, mode: int = STORE, onto: Tensor | None = None
    ) -> Tensor:
        """(rows, out) of a layer behind its norm; added to ``onto`` if there is one."""
        if layer.adapter is not None:
            if norm is not None:
                x, norm = norm(x).to(self.weights.dtype), None
            if onto is not None:
                return onto.add_(self._linear(x, layer))
        weight = layer.plain
        assert weight is not None
        width = len(weight) // 2 if mode == GATE else len(weight)
        y = x.new_empty(len(x), width, dtype=self.weights.dtype) if onto is None else onto
        self.c.opd_linear(
            x.data_ptr(),
            *x.shape,
            *((norm.weight.data_ptr(), float(norm.eps)) if norm is not None else (None, 0.0)),
            weight.data_ptr(),
            None if layer.bias is None else layer.bias.data_ptr(),
            width,
            y.data_ptr(),
            mode if onto is None else ADD,
            self.wide,
            self.space.data_ptr(),
            self.threads,
        )
        return y if layer.adapter is None else layer.adapted(x, y)

    def _attend(self, heads: Tensor, norms: list[Norm] | None, cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
        """(rows, queries * size): what the new tokens read from their rows, to whose cache they are added."""
        y = heads.new_empty(len(heads), self.queries * self.size)
        query, key, eps = (*(n.weight.data_ptr() for n in norms), float(norms[0].eps)) if norms else (None, None, 0.0)
        self.c.opd_attend(
            heads.data_ptr(),
            *(len(heads), self.queries, self.keys, self.size),
            *(cos.data_ptr(), sin.data_ptr(), query, key, eps, self.wide),
            *(cache.data_ptr(), cache.shape[2], self.places.data_ptr(), self.scale, y.data_ptr(), self.threads),
        )
        return y
