"""Attention of rows in one line, in C, against its definition: a few times its errors in float32, fewer in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opd_lightning.ops.packed import PIECE, Segments, Span, computes, library, packed_attention

pytestmark = pytest.mark.skipif(library() is None, reason="no processor or no compiler for it")

Rows = list[tuple[Span, list[Span]]]

LINES: dict[str, Rows] = {
    "one token": [((0, 1), [])],
    "rows": [((0, 5), []), ((5, 6), []), ((6, 37), []), ((37, 61), [])],  # blocks are 24 queries
    "long": [((0, 131), [])],
    "group": [((0, 40), []), ((40, 47), [(0, 40)]), ((47, 90), [(0, 40)]), ((90, 91), [(0, 40)])],
    "forest": [
        ((0, 20), []),
        ((20, 29), [(0, 20)]),
        ((29, 60), [(0, 20), (20, 29)]),
        ((60, 64), [(0, 20), (20, 29)]),
        ((64, 70), [(0, 20)]),
        ((70, 99), []),
    ],
    "pieces": [((0, 2 * PIECE + 7), []), ((2 * PIECE + 7, 2 * PIECE + 40), [(0, 2 * PIECE + 7)])],
}
SCALE = 0.3


def drawn(rows: Rows, heads: int, keys: int, size: int, rest: int = 3) -> list[Tensor]:
    """Queries, keys, values and a gradient, in float64 that bfloat16 holds, with tokens of no row behind."""
    torch.manual_seed(size)
    count = rows[-1][0][1] + rest
    return [torch.randn(count, n, size).bfloat16().double() for n in (heads, keys, keys, heads)]


def defined(rows: Rows, given: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Output and gradients by definition, in a precision."""
    q, k, v, gradient = (x.to(kind) for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    visible = torch.zeros(len(q), len(q), dtype=torch.bool)
    for (start, stop), seen in rows:
        for t in range(start, stop):
            visible[t, [i for a, b in seen for i in range(a, b)] + list(range(start, t + 1))] = True
    end, groups = rows[-1][0][1], q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in leaves[1:])
    scores = (q.transpose(0, 1)[:, :end] @ keys.mT * SCALE).masked_fill(~visible[:end], -torch.inf)
    out = torch.cat([(scores.softmax(-1) @ values).transpose(0, 1), torch.zeros_like(q[end:])])
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, gradient))]


def run(rows: Rows, given: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    q, k, v, gradient = (x.to(kind) for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert computes(q, k, v)
    out = packed_attention(q, k, v, Segments.of(rows), SCALE)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, gradient))]


def errors(found: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys", "size"), [(4, 4, 24), (6, 2, 64), (3, 1, 6), (2, 2, 90)])
@pytest.mark.parametrize("line", LINES)
@pytest.mark.usefixtures("vectors")
def test_as_near_to_float64_as_the_definition(line: str, heads: int, keys: int, size: int, kind: torch.dtype) -> None:
    rows = LINES[line]
    given = drawn(rows, heads, keys, size)
    right = defined(rows, given, torch.float64)
    ours, theirs = errors(run(rows, given, kind), right), errors(defined(rows, given, kind), right)
    small, times = {torch.float32: (3e-7, 2.5), torch.bfloat16: (3e-3, 1.0)}[kind]  # PyTorch's kernels: up to 3.5 times
    if line == "one token":  # queries and keys get no gradient
        assert run(rows, given, kind)[1].abs().max() < 1e-4
        ours, theirs = [ours[0], ours[3]], [theirs[0], theirs[3]]
    assert all(a <= max(times * b, small) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_scores_that_are_far_apart() -> None:
    """Weights below what float32 holds are 0, and none is NaN."""
    rows: Rows = [((0, 50), [])]
    given = drawn(rows, 2, 2, 16)
    given[0], given[1] = given[0] * 40, given[1] * 40
    right = defined(rows, given, torch.float64)
    found = run(rows, given, torch.float32)
    assert all(bool(x.isfinite().all()) for x in found) and errors(found, right)[0] < 1e-4


@pytest.mark.parametrize("line", ["forest", "pieces"])
def test_to_the_bit_the_same_with_other_threads(line: str) -> None:
    rows = LINES[line]
    given = drawn(rows, 6, 2, 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(rows, given, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows = LINES["rows"]
    given = drawn(rows, 2, 2, 24, rest=0)
    together = run(rows, given, torch.float32)
    for (start, stop), _ in rows:
        alone = run([((0, stop - start), [])], [x[start:stop] for x in given], torch.float32)
        assert all(torch.equal(a[start:stop], b) for a, b in zip(together, alone, strict=True))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    rows = LINES["rows"]
    given = drawn(rows, 2, 2, 24)
    given[1][7] = torch.nan  # a key of the third row
    for found in run(rows, given, torch.float32):
        lost = found.isnan().flatten(1).any(1)
        assert not bool(lost[:6].any()) and not bool(lost[37:].any()) and bool(lost[6:37].any())


def test_other_precisions_and_shapes_are_left_to_pytorch() -> None:
    x = torch.ones(3, 2, 8)
    assert computes(x, x, x) and not computes(x.double(), x.double(), x.double()) and not computes(x, x, x.bfloat16())
    assert not computes(x, x, x[..., :4])
