"""Decoding steps in float32 by a C function (`step.c`), on x86-64 processors with vectors of eight numbers and more.

With few rows a step is the reading of the weights; with a small model calls into PyTorch take longer than what they compute.
One function takes the weights as they lie, or packed if they are few, and computes a whole step, every row by itself: what a
row becomes does not depend on the rows beside it. It is built once, with the C compiler of the machine; where there is none
PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lightning.compiling import INT, LONG, POINTER, built, vectors
from opd_lightning.samplers.decoder import Weights
from opd_lightning.samplers.functions import FunctionDecoder, at, regular
from opd_lightning.samplers.linear import Linear

SOURCE = Path(__file__).with_name("step.c")

SMALL = 4_000_000
"""Weights up to which they are packed at every refresh: they stay in caches, so that a step waits for what is done with them
and not for them."""

SHORT = 128
"""Tokens up to which a prompt of such a model is read by the function, one query of attention at a time."""


PRODUCTS = ("qkv", "out", "gate_up", "down")
"""Names of a layer's products."""


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
        *((name, ctypes.c_int64) for name in ("count", "width", "inner", "queries", "keys", "size", "vocab", "room", "packed")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The function, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        found.opd_step.argtypes = [ctypes.POINTER(_Model), POINTER, POINTER, LONG, POINTER, POINTER, INT]
        found.opd_step.restype = None
        found.opd_read.argtypes, found.opd_read.restype = [ctypes.POINTER(_Model), *[POINTER] * 4, LONG, INT], None
        found.opd_pack.argtypes, found.opd_pack.restype = [POINTER, LONG, LONG, POINTER], None
        found.opd_packed.argtypes, found.opd_packed.restype = [LONG, LONG], ctypes.c_int64
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
        parts = [getattr(layer, name).plain for layer in weights.layers for name in PRODUCTS] + [weights.head.plain]
        self.packed = [self._packed(part) for part in parts] if sum(part.numel() for part in parts) <= SMALL else []
        places = iter(at(part) for part in self.packed or parts)
        self.layers = (_Layer * len(weights.layers))()
        for mine, layer in zip(self.layers, weights.layers, strict=True):
            mine.before_attention, mine.before_mlp = at(layer.before_attention), at(layer.before_mlp)
            mine.query_norm, mine.key_norm = map(at, layer.head_norms or (None, None))
            for name in PRODUCTS:
                part: Linear = getattr(layer, name)
                setattr(mine, name, next(places))
                setattr(mine, f"{name}_bias", at(part.bias))
        self.model = _Model(
            self.layers,
            *(at(weights.embedding), at(weights.norm), next(places), at(weights.head.bias), *map(at, self.turns)),
            *(len(self.layers), self.width, self.inner, self.queries, self.keys, self.size, self.vocab, 0),
            *(bool(self.packed), float(weights.norm.eps), self.scale),
        )
        self.numbers = torch.empty(found.opd_room(self.model, rows), dtype=torch.float32)
        self.space = at(self.numbers)
        self._point()

    def _packed(self, weight: Tensor) -> Tensor:
        packed = torch.empty(self.c.opd_packed(*weight.shape), dtype=torch.float32)
        self.c.opd_pack(at(weight), *weight.shape, at(packed))
        return packed

    def _read(self, waiting: list[tuple[tuple[int, ...], int, int]]) -> None:
        most = SHORT if self.packed else 0
        short, long = ([given for given in waiting if (len(given[0]) <= most) is fits] for fits in (True, False))
        if long:
            super()._read(long)
        if short:
            self._read_short(short)

    def _read_short(self, waiting: list[tuple[tuple[int, ...], int, int]]) -> None:
        lengths = [len(prompt) - 1 for prompt, _, _ in waiting]
        ids = [token for prompt, _, _ in waiting for token in prompt[:-1]]
        places = [place for length in lengths for place in range(length)]
        homes = [row for length, (_, row, _) in zip(lengths, waiting, strict=True) for _ in range(length)]
        given = [torch.tensor(x) for x in (ids, places, homes, [0, *accumulate(lengths)])]
        self.c.opd_read(self.model, *map(at, given), len(waiting), self.threads)
        for length, (_, row, count) in zip(lengths, waiting, strict=True):
            if count > 1:
                self._copy(slice(row, row + 1), slice(row + 1, row + count), length)
