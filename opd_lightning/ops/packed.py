"""Causal attention of rows that lie behind each other in one line of tokens, by C functions (`packed.c`), on x86-64 processors
with vectors of eight numbers and more.

PyTorch is called for rows of one length, padded to one, and its kernels are slow with few queries of small heads. Here a row is
where it begins and ends; what rows share stands once. The functions are built once, with the C compiler of the machine; where
there is none, PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.compiling import INT, LONG, POINTER, built, vectors

SOURCE = Path(__file__).with_name("packed.c")
PIECE = 96
"""Tokens of a shared span whose gradients are summed at once: few enough for all cores to have some."""

Span = tuple[int, int]
"""The first token and the one behind the last."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where rows are in a line, and what each sees before its own tokens.

    Attributes:
        table: (count, 4) of first token, the one behind the last, and the row's first span in ``spans`` and the one behind.
        spans: (n, 2) first token and the one behind the last, in the order of the rows' own.
        pieces: (m, 2) the same of all spans, each once, in pieces of at most `PIECE` tokens.
        tokens: of all rows; behind them the line may go on.
        longest: most tokens that a row sees, its own included.
    """

    table: Tensor
    spans: Tensor
    pieces: Tensor
    tokens: int
    longest: int

    @classmethod
    def of(cls, rows: Sequence[tuple[Span, Sequence[Span]]]) -> Segments:
        """Rows from the left to the right of the line, each with the spans that it sees before its own tokens."""
        table: list[tuple[int, ...]] = []
        spans: list[Span] = []
        longest = 0
        for own, seen in rows:
            table.append((*own, len(spans), len(spans) + len(seen)))
            spans += seen
            longest = max(longest, sum(stop - start for start, stop in (*seen, own)))
        pieces = [(a, min(a + PIECE, stop)) for start, stop in dict.fromkeys(spans) for a in range(start, stop, PIECE)]
        return cls(_numbers(table, 4), _numbers(spans, 2), _numbers(pieces, 2), table[-1][1] if table else 0, longest)


def _numbers(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long).view(-1, width)


class _Line(ctypes.Structure):
    """`Line` of the C source."""

    _fields_ = (
        *((name, POINTER) for name in ("q", "k", "v", "segments", "spans")),
        *((name, ctypes.c_int64) for name in ("count", "heads", "keys", "size", "half")),
        ("scale", ctypes.c_float),
    )


class _Back(ctypes.Structure):
    """`Back` of the C source."""

    _fields_ = tuple((name, POINTER) for name in ("out", "gradient", "sizes", "of_q", "of_k", "of_v"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        line, back = ctypes.POINTER(_Line), ctypes.POINTER(_Back)
        found.opd_attend.argtypes = [line, LONG, POINTER, POINTER, INT]
        found.opd_attend_back.argtypes = [line, LONG, back, POINTER, LONG, INT]
        found.opd_attend.restype = found.opd_attend_back.restype = None
    return found


def computes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the functions take these: float32 or bfloat16 on a CPU, values as wide as keys."""
    kind = query.dtype
    alike = all(x.is_cpu and x.dtype == kind and x.shape[-1] == query.shape[-1] for x in (query, key, value))
    return alike and kind in (torch.float32, torch.bfloat16) and library() is not None


def packed_attention(
    query: Float[Tensor, "M H d"], key: Float[Tensor, "M K d"], value: Float[Tensor, "M K d"], segments: Segments, scale: float
) -> Float[Tensor, "M H d"]:
    """``softmax(scale Q K') V`` of every row over what it sees up to each token; 0 behind the last row. Sums are in float32.

    Backwards, with P the weights and dP = dO V': dV = P' dO, dS = P ∘ (dP - rowsum(O ∘ dO)), dQ = scale dS K, dK = scale dS' Q
    (Dao et al. 2022, arXiv 2205.14135); tables are made again, for some queries at a time.

    Args:
        query: of which `computes` is true, with the key and the value. H is a multiple of K.
        key: of all tokens.
        value: of all tokens.
        segments: where the rows are.
        scale: of the scores.
    """
    out: Tensor = _Attention.apply(query, key, value, segments, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        out, sizes = torch.empty_like(query), torch.empty(*query.shape[:2], 2, dtype=torch.float32)
        out[segments.tokens :] = 0
        ctx.save_for_backward(query, key, value, out, sizes)
        ctx.segments, ctx.scale = segments, scale
        line = _line(query, key, value, segments, scale)
        _functions().opd_attend(line, segments.longest, out.data_ptr(), sizes.data_ptr(), torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, out, sizes = ctx.saved_tensors
        segments: Segments = ctx.segments
        found = [torch.empty_like(x) for x in (query, key, value)]
        for x in found:
            x[segments.tokens :] = 0
        gradient = gradient.contiguous()
        back = _Back(*(x.data_ptr() for x in (out, gradient, sizes, *found)))
        line, pieces = _line(query, key, value, segments, ctx.scale), segments.pieces
        longest = max(segments.longest, PIECE)
        _functions().opd_attend_back(line, longest, back, pieces.data_ptr(), len(pieces), torch.get_num_threads())
        return *found, None, None


def _functions() -> Any:
    found = library()
    assert found is not None
    return found


def _line(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> _Line:
    held = (query, key, value, segments.table, segments.spans)
    sizes = len(segments.table), query.shape[1], key.shape[1], query.shape[2], query.dtype == torch.bfloat16
    return _Line(*(x.data_ptr() for x in held), *sizes, scale)
