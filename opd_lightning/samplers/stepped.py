"""Decoding steps in float32 by a C function (`step.c`), on x86-64 processors with vectors of eight numbers and more.

With few rows a step is the reading of the weights; with a small model calls into PyTorch take longer than what they compute.
One function takes the weights as they lie and computes a whole step, every row by itself: what a row becomes does not depend on
the rows beside it. It is built once, with the C compiler of the machine; where there is none PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from opd_lightning.compiling import INT, LONG, POINTER, built, vectors
from opd_lightning.samplers.decoder import Weights
from opd_lightning.samplers.functions import FunctionDecoder, at, regular
from opd_lightning.samplers.linear import Linear

SOURCE = Path(__file__).with_name("step.c")


class _Layer(ctypes.Structure):
    """`Layer` of the C source."""

    _fields_ = tuple(
        (name, POINTER)
        for name in (
            *("before_attention", "qkv", "qkv_bias", "query_norm", "key_norm", "out", "out_bias"),
            *("before_mlp", "gate_up", "gate_up_bias", "down", "down_bias", "cache"),
        )
    )


class _Model(ctypes.Structure):
    """`Model` of the C source."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, POINTER) for name in ("embedding", "norm", "head", "head_bias", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("count", "width", "inner", "queries", "keys", "size", "vocab", "room")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The function, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        found.opd_step.argtypes = [ctypes.POINTER(_Model), POINTER, POINTER, LONG, POINTER, POINTER, INT]
        found.opd_step.restype = None
        found.opd_room.argtypes, found.opd_room.restype = [ctypes.POINTER(_Model), LONG], ctypes.c_int64
    return found


def computes(base: Any, dtype: torch.dtype, vocab: int) -> bool:
    """Whether a model of a known architecture has the shapes and the precision that the function takes.

    Args:
        base: a Hugging Face causal language model.
        dtype: of its products.
        vocab: rows of the head that carry a token.
    """
    config, stream = base.config, base.model.embed_tokens.weight
    if dtype != torch.float32 or stream.dtype != dtype or not regular(base):
        return False
    fit = config.hidden_size % 4 == 0 and base.model.layers[0].self_attn.head_dim % 2 == 0 and vocab >= 4
    return fit and stream.is_cpu and library() is not None


class StepDecoder(FunctionDecoder):
    """The decoder whose step is one C function."""

    def __init__(self, base: Any, weights: Weights, rows: int, prompt: int, length: int) -> None:
        found = library()
        assert found is not None
        super().__init__(found, base, weights, rows, prompt, max(length, 4))  # four places are read at a time
        self.layers = (_Layer * len(weights.layers))()
        for mine, layer in zip(self.layers, weights.layers, strict=True):
            mine.before_attention, mine.before_mlp = at(layer.before_attention), at(layer.before_mlp)
            mine.query_norm, mine.key_norm = map(at, layer.head_norms or (None, None))
            for name in ("qkv", "out", "gate_up", "down"):
                part: Linear = getattr(layer, name)
                setattr(mine, name, at(part.plain))
                setattr(mine, f"{name}_bias", at(part.bias))
        self.model = _Model(
            self.layers,
            *map(at, (weights.embedding, weights.norm, weights.head.plain, weights.head.bias, *self.turns)),
            *(len(self.layers), self.width, self.inner, self.queries, self.keys, self.size, self.vocab, 0),
            *(float(weights.norm.eps), self.scale),
        )
        self.numbers = torch.empty(found.opd_room(self.model, rows))
        self.space = at(self.numbers)
        self._point()
