"""Rows of tokens in one line: no padding, and a beginning that rows share only once.

A layout is a forest. Rows that begin alike share the segment of that beginning (the prompt of a group, or the preamble that
all prompts of a batch have in common) and continue in segments of their own. Everything in a decoder that treats tokens one by
one runs over the line as it is; `opd_lightning.models.attention` keeps the segments apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opd_lightning.ops.packed import Segments, Span
from opd_lightning.types import Rendering

WORTH_SHARING = 32
"""Tokens that a shared beginning must save. Where PyTorch attends, every segment costs a call a layer; on two CPU cores that is
the time of about ten tokens in a layer of 576 units, and less in wider ones."""

FULL_ENOUGH = 0.75
"""On a GPU and in bfloat16, segments attend in one call, padded to the longest of them, if none is shorter than this share of
it. With 16 rows of 17 to 128 tokens behind one prompt, a pass with backward takes 0.88 of the time of one call for each length.
In float32 a CPU starts calls cheaply: there only equal lengths share one."""

MULTIPLE = 64
"""On a CPU, in bfloat16 and where float32 is multiplied as such, the line has a multiple of so many tokens: oneDNN makes a
program for every new shape of a product. That takes 1.3 to 5 ms, longer than a small product itself, and in training would come
again with every batch."""


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``stop`` of rows that agree on them and on all before them.

    Attributes:
        rows: which rows.
        context: the segments before it, in order; together with it they are the beginning of each of its rows.
    """

    rows: tuple[int, ...]
    start: int
    stop: int
    context: tuple[Segment, ...]

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call: segments with the same context, next to each other in the line.

    Attributes:
        span: where they stand in the line.
        rows: how many there are.
        length: of the longest.
        context: spans of the tokens that they see before their own, in order.
        pad: (rows * length,) own token of each slot, counted from the span's start; None if all are equally long.
        unpad: slot of each own token; None with ``pad``.
        mask: (length, context + length) True where a slot may look; None without a context, where the order says it all.
    """

    span: tuple[int, int]
    rows: int
    length: int
    context: tuple[tuple[int, int], ...]
    pad: Tensor | None
    unpad: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Layout:
    """A micro-batch as one line of M tokens.

    Attributes:
        ids: (1, M). Tokens behind the last segment belong to no row.
        positions: (1, M) place of each token in its row, from 0.
        scored: (N,) place in the line of the state of each completion token, row by row.
        batches: segments with the same context, next to each other; they stand in the line from left to right.
        spans: where the segments stand.
    """

    ids: Tensor
    positions: Tensor
    scored: Tensor
    batches: tuple[tuple[Segment, ...], ...]
    spans: Mapping[Segment, Span]

    @cached_property
    @torch.inference_mode(False)  # what is made for a teacher also serves the student's graph
    def calls(self) -> tuple[Call, ...]:
        """Attention calls, one a batch, for kernels that take rows of one length."""
        return tuple(_call(batch, self.spans, self.ids.device) for batch in self.batches)

    @cached_property
    @torch.inference_mode(False)
    def segments(self) -> Segments:
        """The segments, for functions that take them as they are."""
        rows = (segment for batch in self.batches for segment in batch)
        return Segments.of([(self.spans[row], [self.spans[s] for s in row.context]) for row in rows])


def lay_out(
    text: Rendering, worth_sharing: int | None = WORTH_SHARING, full_enough: float | None = None, multiple: int = 1
) -> Layout:
    """Tokens behind a row's last scored position are left out: no scored state depends on them.

    Args:
        text: right-padded rows.
        worth_sharing: tokens that a shared beginning must save; None shares nothing.
        full_enough: shortest segment that attends padded, as a share of the longest beside it; None is the device's own.
        multiple: of what the line is filled up to.
    """
    if full_enough is None:
        full_enough = 1.0 if text.ids.is_cpu else FULL_ENOUGH
    mask = text.mask.cpu().numpy()
    kept = (mask * np.arange(1, mask.shape[1] + 1)).max(-1, initial=0)
    if not kept.any():  # every rank runs its layers, also on nothing
        kept[:1] = 1
    ids = text.ids.cpu().numpy()
    device = text.ids.device
    families: dict[tuple[Segment, ...], list[Segment]] = defaultdict(list)
    for segment in segments_of(ids, kept, worth_sharing):
        families[segment.context].append(segment)
    line = [batch for family in families.values() for batch in _batches(family, full_enough)]
    place = np.zeros(ids.shape, dtype=np.int64)
    spans: dict[Segment, Span] = {}
    end = 0
    for segment in (segment for batch in line for segment in batch):
        spans[segment] = (end, end + segment.length)
        place[list(segment.rows), segment.start : segment.stop] = np.arange(end, end + segment.length)
        end += segment.length
    rest = np.zeros(-end % multiple, dtype=np.int64)
    return Layout(
        ids=_tensor(np.concatenate([*(ids[s.rows[0], s.start : s.stop] for s in spans), rest])[None], device),
        positions=_tensor(np.concatenate([*(np.arange(s.start, s.stop) for s in spans), rest])[None], device),
        scored=_tensor(place[:, :-1][mask], device),
        batches=tuple(map(tuple, line)),
        spans=spans,
    )


def segments_of(ids: np.ndarray, kept: np.ndarray, worth_sharing: int | None = WORTH_SHARING) -> list[Segment]:
    """Cut the first ``kept`` tokens of every row so that beginnings worth sharing stand once.

    >>> rows = np.array([[7, 7, 1, 0], [7, 7, 2, 3], [5, 0, 0, 0]])
    >>> [(s.rows, s.start, s.stop) for s in segments_of(rows, np.array([3, 4, 1]), worth_sharing=2)]
    [((2,), 0, 1), ((0, 1), 0, 2), ((0,), 2, 3), ((1,), 2, 4)]
    """
    rows = [row[:n] for row, n in zip(ids.tolist(), kept.tolist(), strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # rows that begin alike become neighbours
    common = [_common(ids[a], ids[b], min(kept[a], kept[b])) for a, b in pairwise(order)]
    found: list[Segment] = []
    open_: list[tuple[int, int, int, tuple[Segment, ...]]] = [(0, len(rows), 0, ())]
    while open_:
        low, high, start, context = open_.pop()  # neighbours low to high, of which tokens before start are done
        alone = high - low == 1
        stop = int(kept[order[low]]) if alone else min(common[low : high - 1])
        shared = worth_sharing is not None and (stop - start) * (high - low - 1) >= worth_sharing
        if (alone or shared) and stop > start:
            found.append(Segment(tuple(order[low:high]), start, stop, context))
            start, context = stop, (*context, found[-1])
        if not alone:
            cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] == stop), high]
            open_ += [(a, b, start, context) for a, b in pairwise(cuts)][::-1]
    return found


def _common(a: np.ndarray, b: np.ndarray, limit: int) -> int:
    """Length of the common beginning of two rows."""
    differ = a[:limit] != b[:limit]
    return int(differ.argmax()) if differ.any() else int(limit)


def _batches(family: list[Segment], full_enough: float) -> list[list[Segment]]:
    """Segments with one context, in groups of similar length."""
    batches: list[list[Segment]] = []
    for segment in sorted(family, key=lambda s: -s.length):
        if batches and segment.length >= full_enough * batches[-1][0].length:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches


def _call(batch: Sequence[Segment], spans: Mapping[Segment, Span], device: torch.device) -> Call:
    lengths = np.array([s.length for s in batch])
    longest, start = int(lengths.max()), spans[batch[0]][0]
    context = tuple(spans[s] for s in batch[0].context)
    seen = sum(stop - begin for begin, stop in context)
    pad = unpad = None
    if (lengths < longest).any():
        slot = np.arange(longest)
        inside = slot < lengths[:, None]
        own = np.concatenate([[0], lengths.cumsum()[:-1]])[:, None] + np.minimum(slot, lengths[:, None] - 1)
        pad, unpad = _tensor(own.reshape(-1), device), _tensor(inside.reshape(-1).nonzero()[0], device)
    mask = torch.ones(longest, seen + longest, dtype=torch.bool, device=device).tril(seen) if seen else None
    return Call((start, spans[batch[-1]][1]), len(batch), longest, context, pad, unpad, mask)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
