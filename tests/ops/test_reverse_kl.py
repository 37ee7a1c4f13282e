"""The C function against float64, and against what PyTorch makes of the same logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_lightning.objectives import ForwardKL, GeneralizedJSD, Objective, ReverseKL
from opd_lightning.objectives import rows as objective_rows
from opd_lightning.ops import logprobs as lp
from opd_lightning.ops.reach import Reach, reach
from opd_lightning.ops.reverse_kl import Compared, Further, compared, computes, library
from tests.objectives.test_fused import HEADS, Pair, rollout, shrink

builds = pytest.mark.skipif(library() is None, reason="no processor or no compiler for it")
KINDS = [torch.float32, torch.bfloat16]
FLOOR = lp.floor_of(torch.float32)


def laws(rows: int, vocab: int, padding: int = 0, kind: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of both models (rows that lie further apart than they are long), drawn tokens, factors."""
    draw = torch.Generator().manual_seed(vocab)
    both = 3.0 * torch.randn(2, rows, vocab + padding, generator=draw)
    tokens = torch.randint(vocab, (rows,), generator=draw)
    return *both.to(kind)[:, :, :vocab], tokens, torch.rand(rows, generator=draw) - 0.3


def exactly(student: Tensor, teacher: Tensor, tokens: Tensor, factors: Tensor, temperature: float) -> Compared:
    """The same in float64, with autograd; log-probabilities are held at float32's floor."""
    leaf = student.double().requires_grad_()
    s, t = ((x / temperature).log_softmax(-1).clamp(min=FLOOR) for x in (leaf, teacher.double()))
    value = (s.exp() * (s - t)).sum(-1)
    (gradient,) = torch.autograd.grad((factors.double() * value).sum(), leaf)
    drawn = [lp.gather(x.detach(), tokens) for x in (s, t)]
    entropies = [-(x.exp() * x).sum(-1).detach() for x in (s, t)]
    wanted = reach(s.detach(), t, s.detach().exp(), t.exp(), tokens)
    normalizers = [(x.double() / temperature).logsumexp(-1) for x in (student, teacher)]
    further = Further(wanted, *normalizers)
    return Compared(value.detach(), drawn[0], drawn[1], entropies[0], entropies[1], gradient, further)


def near(found: Compared | None, exact: Compared, by_torch: Tensor | None = None) -> None:
    """``by_torch``: the gradient that PyTorch makes of the same float32 logits; where a law is sure of one token, sums of large
    and equal numbers leave little of its digits.
    """
    assert found is not None
    assert found.more is not None and exact.more is not None
    pairs = {name: (getattr(found, name), getattr(exact, name)) for name in Compared._fields[:-2]}
    pairs |= {name: (getattr(found.more, name), getattr(exact.more, name)) for name in Further._fields[1:]}
    pairs |= {name: (getattr(found.more.reach, name), getattr(exact.more.reach, name)) for name in Reach._fields}
    for name, (mine, true) in pairs.items():
        torch.testing.assert_close(mine.double(), true, rtol=2e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    if by_torch is None:  # rounded once, from float32
        least = 1e-6 * float(exact.gradient.abs().max())
        torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=2**-8, atol=least)
    else:
        ours, theirs = ((x.double() - exact.gradient).norm() for x in (found.gradient, by_torch))
        assert ours <= max(1.5 * float(theirs), 1e-6 * float(exact.gradient.norm()))


@builds
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 100, 4096, 4097, 49152, 151_936])
@pytest.mark.usefixtures("vectors")
def test_as_in_float64(vocab: int, temperature: float, kind: torch.dtype) -> None:
    given = laws(5, vocab, vocab % 3, kind)
    exact, by_torch = exactly(*given, temperature), None
    if kind == torch.float32:
        s, t = (lp.log_softmax(x, temperature) for x in given[:2])
        by_torch = ReverseKL().logit_gradient(s, t, s.exp(), t.exp())[1] * given[3][:, None] / temperature
    found, short = compared(*given, temperature, more=True), compared(*given, temperature)
    near(found, exact, by_torch)
    assert short.more is None and all(torch.equal(a, b) for a, b in zip(short[:-1], found[:-1], strict=True))
    near(compared(*given, temperature, given[0], True), exact, by_torch)  # the gradient takes the place of the logits


@builds
def test_equal_laws_have_no_divergence_and_a_row_does_not_depend_on_others() -> None:
    student, teacher, tokens, factors = laws(7, 1000)
    same = compared(student, student, tokens, factors)
    assert same is not None and not same.value.any() and not same.gradient.any()
    together, alone = (
        compared(student, teacher, tokens, factors),
        compared(student[3:4], teacher[3:4], tokens[3:4], factors[3:4]),
    )
    assert together is not None and alone is not None
    for whole, part in zip(together[:-1], alone[:-1], strict=True):
        assert torch.equal(whole[3:4], part)


@builds
def test_the_floor_of_log_probabilities_is_that_of_pytorch() -> None:
    """Masked logits, and a teacher that is sure of something else: the value depends on where the floor lies."""
    student, teacher, tokens, factors = laws(6, 333)
    student[:, 5] = teacher[:, [5, 9]] = -math.inf
    teacher[1:3, 17] = 95.0
    student[2, 40] = student[3, 41] = 95.0
    tokens[0], tokens[1] = 5, 9
    given = student, teacher, tokens, factors
    near(compared(*given, more=True), exactly(*given, 1.0))


@builds
def test_what_is_not_a_number_is_not_hidden() -> None:
    for which in (0, 1):
        given = laws(3, 50)
        given[which][1, 20] = math.nan
        found = compared(*given)
        assert found is not None
        assert [bool(x) for x in found.value.isnan()] == [False, True, False]
        assert bool(found.gradient[1].isnan().any()) and not found.gradient[[0, 2]].isnan().any()


@builds
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("agreement_k", [0, 3])
def test_an_objective_through_it(head: str, kind: torch.dtype, agreement_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and measurements are PyTorch's, gradients as near to float64 as those, whatever the head does to the logits."""

    def run(calls: bool) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        pair, seen = Pair.random(kind, **HEADS[head]), []
        with monkeypatch.context() as patch:
            shrink(patch)
            patch.setattr(objective_rows, "computes", lambda *a: seen.append(computes(*a)) or (calls and seen[-1]))
            out = Objective(ReverseKL(), temperature=1.5)(pair.student, pair.teacher, rollout(), agreement_k)
            found = torch.autograd.grad(out.loss, [pair.student.hidden, *pair.student.head.trained])
        assert len(seen) > 3 and all(seen)
        return out.loss.detach(), list(found), out.stats.values

    (loss, gradients, stats), (expected, others, known) = run(True), run(False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert stats.keys() == known.keys()
    for key, values in known.items():
        torch.testing.assert_close(stats[key], values, rtol=1e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    for mine, theirs in zip(gradients, others, strict=True):
        digits = {torch.bfloat16: 4e-3, torch.float32: 1e-5}[kind]
        assert float((mine - theirs).double().norm() / theirs.double().norm()) < digits


@builds
def test_nothing_else_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 is left to PyTorch by the function, other divergences by the objective."""
    shrink(monkeypatch)
    seen: list[bool] = []
    monkeypatch.setattr(objective_rows, "computes", lambda *a: seen.append(computes(*a)) or seen[-1])
    for divergence in (ForwardKL(), GeneralizedJSD(0.3)):
        pair = Pair.random(torch.bfloat16)
        Objective(divergence)(pair.student, pair.teacher, rollout())
    assert not seen
    pair = Pair.random(torch.float64)
    Objective(ReverseKL())(pair.student, pair.teacher, rollout())
    assert seen and not any(seen)
