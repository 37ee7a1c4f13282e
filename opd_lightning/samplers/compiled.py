"""Decoding steps in bfloat16 by a C function (`thin.c`), on processors that multiply it: tiles (Xeon since 2023) or vectors
(EPYC since 2022).

With few rows a step is the reading of the weights, and small PyTorch calls take longer than they compute. One function takes
the weights as they lie, with the adapters beside them, and computes a whole step; under mixed precision the residual stream
stays in float32. It is built once, with the C compiler of the machine; where there is none the decoder in PyTorch does the
same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lightning.compiling import HALVES, INT, LONG, POINTER, built, vectors
from opd_lightning.samplers.decoder import Weights
from opd_lightning.samplers.functions import FunctionDecoder, at, regular
from opd_lightning.samplers.linear import Linear

SOURCE = Path(__file__).with_name("thin.c")
TILES = ("amx-tile", "amx-bf16")


class _Linear(ctypes.Structure):
    """`Linear` of the C source."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "bias", "down", "up")),
        ("out", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """`Layer` of the C source."""

    _fields_ = (
        *((name, _Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, POINTER) for name in ("before_attention", "before_mlp", "query_norm", "key_norm", "cache")),
    )


class _Model(ctypes.Structure):
    """`Model` of the C source."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, POINTER) for name in ("embedding", "norm")),
        ("head", _Linear),
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("count", "width", "inner", "queries", "keys", "size", "room", "wide")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class _Space(ctypes.Structure):
    """`Space` of the C source."""

    _fields_ = tuple((name, POINTER) for name in ("x", "heads", "mixed", "inside", "tiles", "scales", "low"))


def supported() -> bool:
    """Whether this processor multiplies bfloat16."""
    return HALVES in (vectors() or ())


def has_tiles() -> bool:
    """Whether it multiplies tiles of it (AMX), and the system lets this process do so."""
    return supported() and bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


@functools.cache
def library(tiles: bool | None = None) -> ctypes.CDLL | None:
    """The function, built at the first call on this machine; None where that cannot be done.

    Args:
        tiles: whether it multiplies tiles rather than vectors; None is what the processor has.
    """
    more = TILES if (has_tiles() if tiles is None else tiles) else ()
    found = built(SOURCE, (*(vectors() or ()), *more)) if supported() else None
    if found is not None:
        found.opd_step.argtypes = [ctypes.POINTER(_Model), POINTER, POINTER, LONG, ctypes.POINTER(_Space), POINTER, INT]
        found.opd_step.restype = None
    return found


def computes(base: Any, dtype: torch.dtype, vocab: int) -> bool:
    """Whether a model of a known architecture has the shapes and the precision that the function takes.

    Args:
        base: a Hugging Face causal language model.
        dtype: of its products.
        vocab: rows of the head that carry a token.
    """
    config, attention, stream = base.config, base.model.layers[0].self_attn, base.model.embed_tokens.weight
    if dtype != torch.bfloat16 or stream.dtype not in (dtype, torch.float32) or not regular(base):
        return False
    sizes = (config.hidden_size, config.intermediate_size, attention.head_dim)
    fit = all(size % 32 == 0 for size in sizes) and vocab >= 16
    return fit and stream.is_cpu and library() is not None


class CompiledDecoder(FunctionDecoder):
    """The decoder whose step is one C function."""

    def __init__(self, base: Any, weights: Weights, rows: int, prompt: int, length: int) -> None:
        found = library()
        assert found is not None
        super().__init__(found, base, weights, rows, prompt, max(length, 16))  # sixteen places are read at a time
        self.kept: list[Tensor] = []
        self.layers = (_Layer * len(weights.layers))()
        for mine, layer in zip(self.layers, weights.layers, strict=True):
            parts = (layer.qkv, layer.out, layer.gate_up, layer.down)
            mine.qkv, mine.output, mine.gate_up, mine.down = map(self._linear, parts)
            mine.before_attention, mine.before_mlp = at(layer.before_attention), at(layer.before_mlp)
            mine.query_norm, mine.key_norm = map(at, layer.head_norms or (None, None))
        head = self._linear(weights.head)
        stream = weights.embedding.dtype
        self.model = _Model(
            *(self.layers, at(weights.embedding), at(weights.norm), head, *map(at, self.turns)),
            *(len(self.layers), self.width, self.inner, self.queries, self.keys, self.size, 0),
            *(stream == torch.float32, float(weights.norm.eps), self.scale),
        )
        mixed, heads = self.queries * self.size, (self.queries + 2 * self.keys) * self.size
        rank = max(part.rank for mine in self.layers for part in (mine.qkv, mine.output, mine.gate_up, mine.down, head))
        groups = (rows + 15) // 16 * 16
        self.space = _Space(
            self._room(rows * self.width, stream),
            *(self._room(rows * each, weights.dtype) for each in (heads, mixed, self.inner)),
            self._room(groups * max(self.width, self.inner, mixed), weights.dtype),
            *(self._room(count, torch.float32) for count in (groups, rows * rank)),
        )
        self._point()

    def _linear(self, layer: Linear) -> _Linear:
        assert layer.plain is not None
        down = up = None
        if layer.adapter is not None:
            down, up = layer.adapter[0].float().contiguous(), layer.adapter[1].float().T.contiguous()
            self.kept += [down, up]
        return _Linear(*map(at, (layer.plain, layer.bias, down, up)), len(layer.plain), 0 if down is None else len(down))

    def _room(self, count: int, dtype: torch.dtype) -> int | None:
        self.kept.append(torch.empty(count, dtype=dtype))
        return at(self.kept[-1])
