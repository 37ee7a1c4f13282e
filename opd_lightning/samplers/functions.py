"""What decoders whose steps are C functions have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opd_lightning.samplers import drawing
from opd_lightning.samplers.decoder import HEAD_NORMS, Decoder, Norm, Weights
from opd_lightning.samplers.drawing import Draws, Law


class FunctionDecoder(Decoder):
    """A decoder whose step is one call of ``opd_step``. Prompts are read by PyTorch, which is as fast with many tokens, but
    for the short ones of small models.

    A class behind it describes the model and makes room for its steps.
    """

    packs = False
    model: Any
    """The structure that the function takes for the model."""
    layers: Any
    """Those of its layers."""
    space: Any
    """What the function takes for its room."""

    def __init__(self, c: ctypes.CDLL, base: Any, weights: Weights, rows: int, prompt: int, length: int) -> None:
        super().__init__(base, weights, rows, prompt, length)
        self.c, self.threads = c, torch.get_num_threads()
        self.turns = self.cos.float().contiguous(), self.sin.float().contiguous()
        assert weights.head.plain is not None and weights.layers[0].down.plain is not None
        self.vocab, self.width = weights.head.plain.shape
        self.inner = weights.layers[0].down.plain.shape[1]

    def _reserve(self, length: int) -> None:
        room = self.room
        super()._reserve(length)
        if room != self.room:
            self._point()

    def _point(self) -> None:
        """Tell where the cache lies."""
        self.model.room = self.room
        for mine, cache in zip(self.layers, self.cached, strict=True):
            mine.cache = at(cache)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self._reserve(max(self.lengths) + 1)
        logits = torch.empty(len(ids), self.vocab, dtype=self.weights.dtype)
        self.c.opd_step(
            *(self.model, ids.data_ptr(), self.places.data_ptr(), len(ids)), *(self.space, logits.data_ptr(), self.threads)
        )
        self.lengths = [n + 1 for n in self.lengths]
        self.places = self.places + 1
        return logits

    @torch.inference_mode()
    def run(self, ids: Tensor, law: Law, uniforms: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        longest = max(self.lengths)
        self._reserve(longest + 1)
        logits = torch.empty(len(ids), self.vocab, dtype=self.weights.dtype)
        if not law.is_drawn_by_function(logits):
            return super().run(ids, law, uniforms, ends)
        writes: Any = drawing.library()
        draws, tokens, logprobs = Draws.of(logits, uniforms[:, : self.room - longest], law.temperature)
        ids, places = ids.clone(), self.places.clone()
        step = ctypes.cast(self.c.opd_step, ctypes.c_void_p)
        taken = writes.opd_write(
            *(step, _address(self.model), _address(self.space), draws, ends.data_ptr()),
            *(ids.data_ptr(), places.data_ptr(), len(ids), self.threads),
        )
        self.lengths, self.places = [n + taken for n in self.lengths], places
        return tokens[:, :taken], logprobs[:, :taken]


def _address(held: Any) -> int:
    return held if isinstance(held, int) else ctypes.addressof(held)


def at(held: Tensor | Norm | None) -> int | None:
    """The address of some numbers; None for none."""
    if held is None:
        return None
    held = held.weight if isinstance(held, Norm) else held
    assert held.is_contiguous()
    return held.data_ptr()


def regular(base: Any) -> bool:
    """Whether gates are SiLU, and all norms of a model of a known architecture have the residual stream's precision and one
    epsilon.
    """
    stream = base.model.embed_tokens.weight.dtype
    alike = all(norm.weight.dtype == stream for norm in _norms_of(base))
    return base.config.hidden_act in ("silu", "swish") and alike and len({float(Norm(n).eps) for n in _norms_of(base)}) == 1


def _norms_of(base: Any) -> Iterator[Any]:
    yield base.model.norm
    for layer in base.model.layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        yield from (getattr(layer.self_attn, name) for name in HEAD_NORMS if hasattr(layer.self_attn, name))
