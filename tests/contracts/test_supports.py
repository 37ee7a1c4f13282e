"""Supports and their closures against closed forms, and the identity that ties the top-k variants together."""

from __future__ import annotations

import itertools

import pytest
import torch

from opd_lightning.objectives import ForwardKL, FullVocab, GeneralizedJSD, ReverseKL, SampledToken, TopK, WrittenToken
from opd_lightning.objectives.supports import Scores
from opd_lightning.ops.logprobs import log_softmax
from tests.objectives.members import FURTHER

DIVERGENCES = [ReverseKL(), ForwardKL(), GeneralizedJSD(0.3), *FURTHER]
CLOSED = [
    (divergence, closure)
    for divergence in DIVERGENCES
    for closure in ("tail", "renormalize", "stop_gradient")
    if divergence.separable or closure != "stop_gradient"
]
each_closed = pytest.mark.parametrize(("divergence", "closure"), CLOSED, ids=repr)
BY = ["student", "teacher", "union", "intersection"]
TOKENS = torch.tensor([0])


def laws(seed: int = 0, vocab: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, w = 1.5 * torch.randn(2, 1, vocab, generator=generator, dtype=torch.float64)
    return z.requires_grad_(True), w.log_softmax(-1)


def gradient(support: object, divergence: object, z: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    scores: Scores = support.score(divergence, z.log_softmax(-1), teacher, TOKENS)
    return torch.autograd.grad(scores.direct.sum(), z)[0]


def identity_u(z: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """``c sum_S p_v (d_v - b) grad log p_v`` written out over the vocabulary."""
    p = z.detach().softmax(-1)[0]
    d = p.log() - teacher[0]
    out = torch.zeros_like(p)
    for v in ids.tolist():
        onehot = torch.zeros_like(p)
        onehot[v] = 1.0
        out += c * p[v] * (d[v] - b) * (onehot - p)
    return out[None]


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.parametrize("closure", ["tail", "renormalize", "stop_gradient", "raw"])
def test_the_one_identity_of_truncated_reverse_kl(k: int, by: str, closure: str) -> None:
    z, teacher = laws(k)
    chooser = z.detach() if by == "student" else teacher
    ids = chooser.topk(k).indices[0]
    p, q = z.detach().softmax(-1)[0, ids], teacher.exp()[0, ids]
    m, mt = p.sum(), q.sum()
    b, c = {
        "raw": (-1.0, 1.0),
        "stop_gradient": (0.0, 1.0),
        "renormalize": (float((p * (p / q).log()).sum() / m), float(1 / m)),
        "tail": (float(((1 - m) / (1 - mt)).log()), 1.0),
    }[closure]
    mine = gradient(TopK(k, by, closure), ReverseKL(), z, teacher)
    torch.testing.assert_close(mine, identity_u(z, teacher, ids, b, c), atol=1e-12, rtol=1e-9)


@each_closed
@pytest.mark.parametrize("by", BY)
def test_k_equal_to_the_vocabulary_is_the_full_sum(divergence: object, by: str, closure: str) -> None:
    z, teacher = laws()
    whole = gradient(FullVocab(), divergence, z, teacher)
    mine = gradient(TopK(12, by, closure), divergence, z, teacher)
    torch.testing.assert_close(mine, whole, atol=1e-10, rtol=1e-8)


@each_closed
@pytest.mark.parametrize("by", BY)
def test_nothing_moves_where_student_and_teacher_agree(divergence: object, by: str, closure: str) -> None:
    z, _ = laws()
    mine = gradient(TopK(3, by, closure), divergence, z, z.detach().log_softmax(-1))
    assert mine.abs().max() < 1e-12


def test_the_tail_bucket_is_a_lower_bound_that_grows_with_k() -> None:
    z, teacher = laws(5)
    s = z.detach().log_softmax(-1)
    full = FullVocab().score(ReverseKL(), s, teacher, TOKENS).direct.item()
    bounds = [TopK(k, "teacher", "tail").score(ReverseKL(), s, teacher, TOKENS).direct.item() for k in range(1, 12)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(full)


@each_closed
@pytest.mark.parametrize("by", BY)
def test_masked_and_certain_laws_stay_finite_on_a_support(divergence: object, by: str, closure: str) -> None:
    inf = float("inf")
    rows = torch.tensor([[1.0, 2.0, 0.5, -inf], [0.0, -inf, -inf, -inf], [80.0, 0.0, 0.0, -inf], [0.0, 80.0, 0.0, -inf]])
    z = rows.repeat(4, 1).requires_grad_(True)  # every student meets every teacher
    scores = TopK(2, by, closure).score(
        divergence, log_softmax(z), log_softmax(rows.repeat_interleave(4, 0)), TOKENS.expand(16)
    )
    assert torch.isfinite(scores.direct).all()
    assert torch.isfinite(torch.autograd.grad(scores.direct.sum(), z)[0]).all()


@each_closed
def test_an_empty_intersection_gives_zero(divergence: object, closure: str) -> None:
    z = torch.tensor([[5.0, 4.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 4.0, 5.0]], dtype=torch.float64).log_softmax(-1)
    scores = TopK(2, "intersection", closure).score(divergence, z.log_softmax(-1), teacher, TOKENS)
    (found,) = torch.autograd.grad(scores.direct.sum(), z)
    assert abs(scores.direct.item()) < 1e-12
    assert found.abs().max() < 1e-12


def test_a_union_counts_shared_entries_once() -> None:
    z, teacher = laws(8)
    s = z.detach().log_softmax(-1)
    ids = sorted({*s.topk(3).indices[0].tolist(), *teacher.topk(3).indices[0].tolist()})
    p, q = s.exp()[0, ids], teacher.exp()[0, ids]
    expected = (p * (p / q).log() - p + q).sum()
    mine = TopK(3, "union", "stop_gradient").score(ReverseKL(), s, teacher, TOKENS).direct
    torch.testing.assert_close(mine[0], expected)


def test_the_vocabulary_is_gone_after_a_sampled_token() -> None:
    z, teacher = laws()
    scores = SampledToken().score(ReverseKL(), z.log_softmax(-1), teacher, torch.tensor([4]))
    difference = z.detach().log_softmax(-1)[0, 4] - teacher[0, 4]
    assert scores.direct is None
    torch.testing.assert_close(scores.reward[0], -difference)
    torch.testing.assert_close(scores.cost[0], difference)


def test_a_written_token_is_cross_entropy() -> None:
    z, _ = laws()
    scores = WrittenToken().score(ForwardKL(), z.log_softmax(-1), None, torch.tensor([2]))
    torch.testing.assert_close(scores.direct, torch.nn.functional.cross_entropy(z, torch.tensor([2]), reduction="none"))


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TopK(0)


@pytest.mark.parametrize("closure", ["tail", "renormalize", "renormalize_teacher", "stop_gradient", "sampled_tail"])
def test_an_empty_intersection_compares_nothing(closure: str) -> None:
    student, teacher = torch.tensor([[0.0, 3.0, 0.0]]).log_softmax(-1), torch.tensor([[3.0, 0.0, 0.0]]).log_softmax(-1)
    scores = TopK(1, "intersection", closure).score(ForwardKL(), student, teacher, TOKENS)
    assert abs(scores.direct.item()) < 1e-6
