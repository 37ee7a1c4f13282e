"""Every credit against its definition, completion by completion, and what its expectation is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from opd_lightning.inspect.oracle import Path, TabularWorld
from opd_lightning.objectives import (
    Baseline,
    Clip,
    ClosedFormBaseline,
    Constant,
    Discounted,
    FullVocab,
    GeneralizedJSD,
    Immediate,
    KStep,
    LengthNormalised,
    Objective,
    PositionDecay,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    TopK,
    TopKBaseline,
    TotalReturn,
)
from tests.objectives.textbook import Book, close, golden, reverse_kl, world, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def sampled(credit: object, baseline: object = None, **axes: object) -> Objective:
    extra = {} if baseline is None else {"baseline": baseline}
    return Objective(ReverseKL(), SampledToken(), credit, reduction=Constant(1.0), **extra, **axes)


def later(costs: list[float], t: int, gamma: float, steps: int = 99) -> float:
    return sum(gamma**k * costs[t + k] for k in range(1, min(steps, len(costs) - t - 1) + 1))


def by_definition(kind: str, rewards: list[float], costs: list[float], kls: list[float]) -> list[float]:
    """``rewards`` is the token's own signal, ``costs`` what it costs the tokens before it."""
    out = []
    for t, r in enumerate(rewards):
        n = len(rewards) - t - 1
        out.append(
            r
            - {
                "immediate": 0.0,
                "discounted": later(costs, t, 0.6),
                "discounted exact": later(kls, t, 0.6),
                "to go": sum(costs[t + 1 :]),
                "to go exact": sum(kls[t + 1 :]),
                "total": sum(costs[:t]) + sum(costs[t + 1 :]),
                "two steps": later(kls, t, 0.6, 1),
                "normalised": later(costs, t, 0.6) / max(n, 1),
                "normalised exact": later(kls, t, 1.0) / max(n, 1),
            }[kind]
        )
    return out


CREDITS = {
    "immediate": Immediate(),
    "discounted": Discounted(0.6),
    "discounted exact": Discounted(0.6, analytic=True),
    "to go": ReturnToGo(),
    "to go exact": ReturnToGo(analytic=True),
    "total": TotalReturn(),
    "two steps": KStep(2, 0.6),
    "normalised": LengthNormalised(0.6),
    "normalised exact": LengthNormalised(analytic=True),
}


@each_world
@pytest.mark.parametrize("kind", CREDITS)
def test_every_credit_is_what_its_definition_says_on_every_completion(name: str, kind: str) -> None:
    book = Book(WORLDS[name])

    def advantages(path: Path) -> list[float]:
        rewards = book.rewards(path)
        return by_definition(kind, rewards, [-r for r in rewards], book.kls(path))

    close(WORLDS[name].gradients_of(sampled(CREDITS[kind])), book.scores(advantages), 1e-12)


@pytest.mark.parametrize("kind", CREDITS)
def test_other_divergences_give_credit_for_f_and_not_for_the_advantage(kind: str) -> None:
    """JSD written with u = q / p: the own signal is u f' - f, the cost of a later token is f, its mean is the divergence."""
    book, beta = Book(WORLDS["eos"]), 0.3

    def f(u: float) -> float:
        m = beta * u + 1 - beta
        return beta * u * math.log(u / m) - (1 - beta) * math.log(m) + beta * math.log(beta) * (u - 1)  # does not grow with u

    def advantage(u: float) -> float:
        return (1 - beta) * math.log(beta * u + 1 - beta)

    def divergence(s: int) -> float:
        return sum(p * f(q / p) for p, q in zip(book.p[s], book.q[s], strict=True))

    def advantages(path: Path) -> list[float]:
        us = [book.q[s][v] / book.p[s][v] for s, v in zip(path.states, path.tokens, strict=True)]
        return by_definition(kind, [advantage(u) for u in us], [f(u) for u in us], [divergence(s) for s in path.states])

    objective = Objective(GeneralizedJSD(beta), SampledToken(), CREDITS[kind], reduction=Constant(1.0))
    close(WORLDS["eos"].gradients_of(objective), book.scores(advantages), 1e-12)


@pytest.mark.parametrize("kind", CREDITS)
def test_exact_supports_add_credit_to_the_differentiated_divergence(kind: str) -> None:
    book = Book(WORLDS["eos"])
    student = WORLDS["eos"].student

    def advantages(path: Path) -> list[float]:
        kls = book.kls(path)
        return by_definition(kind, [0.0] * len(kls), kls, kls)

    expected = book.scores(advantages)
    for s in range(len(book.p)):
        (own,) = torch.autograd.grad(reverse_kl(student[s].softmax(-1), torch.tensor(book.q[s], dtype=torch.float64)), student)
        for i, path in enumerate(WORLDS["eos"].paths):
            expected[i] += own * path.states.count(s)
    found = WORLDS["eos"].gradients_of(Objective(ReverseKL(), FullVocab(), CREDITS[kind], reduction=Constant(1.0)))
    close(found, expected, 1e-12)


@each_world
def test_total_return_has_the_mean_of_return_to_go_and_more_variance(name: str) -> None:
    total, to_go = (WORLDS[name].moments_of(sampled(c)) for c in (TotalReturn(), ReturnToGo()))
    close(total.mean, to_go.mean)
    close(to_go.mean, Book(WORLDS[name]).gradient_of_sum(reverse_kl, 1.0))
    assert total.trace > 1.02 * to_go.trace


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_exact_later_costs_keep_the_mean_and_lower_the_variance(seed: int, gamma: float) -> None:
    here = world(3, 3, seed, eos=2)
    noisy, exact = (here.moments_of(sampled(Discounted(gamma, analytic))) for analytic in (False, True))
    close(exact.mean, noisy.mean)
    assert exact.trace < noisy.trace


def test_exact_later_costs_are_exact_for_a_bent_signal_too() -> None:
    noisy, exact = (WORLDS["eos"].moments_of(sampled(ReturnToGo(a), shaper=Clip(0.4))) for a in (False, True))
    close(exact.mean, noisy.mean)
    assert exact.trace < noisy.trace


def test_sampled_tail_hands_back_the_whole_divergence() -> None:
    for analytic in (False, True):
        tail = Objective(ReverseKL(), TopK(1, closure="sampled_tail"), ReturnToGo(analytic), reduction=Constant(1.0))
        close(WORLDS["eos"].moments_of(tail).mean, Book(WORLDS["eos"]).gradient_of_sum(reverse_kl, 1.0))


def test_golden_rao_blackwell() -> None:
    found = golden().moments_of(sampled(ReturnToGo(analytic=True)))
    close(-found.mean[0], torch.tensor([-0.35655472, 0.11575749, 0.24079723], dtype=torch.float64), 6e-8)
    assert found.trace == pytest.approx(0.39863181, abs=6e-9)


@each_world
def test_the_divergence_of_the_own_state_is_no_signal(name: str) -> None:
    """- KL(s_t) as an advantage has mean zero; in place of the own log-ratio it loses the local term."""
    book = Book(WORLDS[name])
    close(book.mean(book.scores(lambda path: [-kl for kl in book.kls(path)])), torch.zeros(len(book.p), book.vocab).double())
    trapped = book.mean(book.scores(lambda path: [-sum(book.kls(path)[t:]) for t in range(len(path.tokens))]))
    coupling = WORLDS[name].moments_of(sampled(ReturnToGo())).mean - WORLDS[name].moments_of(sampled(Immediate())).mean
    close(trapped, coupling)


@each_world
def test_window_limits(name: str) -> None:
    at = WORLDS[name]
    for nothing in (KStep(1, 0.7), KStep(3, 0.0)):
        close(at.gradients_of(sampled(nothing)), at.gradients_of(sampled(Immediate())), 0.0)
        assert sampled(nothing).declared_target == sampled(Immediate()).declared_target
    with pytest.raises(ValueError, match="discounts"):
        KStep(1, 7.0)
    for k in (at.horizon, 10**6):
        for gamma in (0.7, 1.0):
            close(at.gradients_of(sampled(KStep(k, gamma))), at.gradients_of(sampled(Discounted(gamma, analytic=True))), 1e-13)


@each_world
@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
def test_decayed_positions_times_discounted_credit_are_the_gradient_of_the_discounted_sum(name: str, gamma: float) -> None:
    exact = Book(WORLDS[name]).gradient_of_sum(reverse_kl, gamma)
    for support in (SampledToken(), FullVocab()):
        for analytic in (False, True):
            credit, gates = Discounted(gamma, analytic), [PositionDecay(gamma)]
            objective = Objective(ReverseKL(), support, credit, reduction=Constant(1.0), gates=gates)
            assert objective.declared_target.biases == ()
            close(WORLDS[name].moments_of(objective).mean, exact)
    if gamma < 1.0:
        alone = WORLDS[name].moments_of(sampled(Discounted(gamma))).mean
        assert (alone - exact).abs().max() > 1e-3
        other = sampled(Discounted(gamma), gates=[PositionDecay(0.5 * gamma)])
        assert (WORLDS[name].moments_of(other).mean - exact).abs().max() > 1e-3
        assert other.declared_target.biases


def asymmetry(field: Callable[[TabularWorld], torch.Tensor], at: TabularWorld, step: float = 1e-5) -> float:
    """Relative asymmetry of a field's Jacobian, by central differences: 0 for a gradient."""
    base = at.student.detach()
    columns = []
    for i in range(base.numel()):
        bump = torch.zeros_like(base).flatten()
        bump[i] = step
        ends = [field(TabularWorld(base + sign * bump.view_as(base), at.teacher, at.horizon, at.eos)) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]).flatten() / (2 * step))
    jacobian = torch.stack(columns)
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


def test_only_undiscounted_credit_descends_a_scalar() -> None:
    at = world(2, 2, seed=3)
    for gamma, low, high in ((0.0, 0.05, 9.0), (0.5, 0.02, 9.0), (1.0, 0.0, 1e-7)):
        found = asymmetry(lambda w, g=gamma: w.moments_of(sampled(Discounted(g))).mean, at)
        assert low <= found < high, (gamma, found)
    decayed = sampled(Discounted(0.5), gates=[PositionDecay(0.5)])
    assert asymmetry(lambda w: w.moments_of(decayed).mean, at) < 1e-7


# ---- baselines -----------------------------------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("credit", [Immediate(), ReturnToGo()], ids=repr)
def test_top_k_baseline_by_its_formula_without_bias(name: str, k: int, credit: object) -> None:
    """- KL of both laws renormalised on the student's k likeliest tokens."""
    book = Book(WORLDS[name])

    def baseline(s: int) -> float:
        ids = sorted(range(book.vocab), key=lambda v: -book.p[s][v])[:k]
        m, mq = sum(book.p[s][v] for v in ids), sum(book.q[s][v] for v in ids)
        return -sum(book.p[s][v] / m * math.log((book.p[s][v] / m) / (book.q[s][v] / mq)) for v in ids)

    def advantages(path: Path) -> list[float]:
        rewards = book.rewards(path)
        plain = by_definition("to go" if credit.gamma else "immediate", rewards, [-r for r in rewards], [])
        return [a - baseline(s) for a, s in zip(plain, path.states, strict=True)]

    found = WORLDS[name].gradients_of(sampled(credit, TopKBaseline(k)))
    close(found, book.scores(advantages), 1e-12)
    close(book.mean(found), WORLDS[name].moments_of(sampled(credit)).mean)
    if k == book.vocab:
        close(found, WORLDS[name].gradients_of(sampled(credit, ClosedFormBaseline())), 1e-12)


@pytest.mark.parametrize("kind", CREDITS)
def test_an_identical_teacher_leaves_every_advantage_zero(kind: str) -> None:
    table = WORLDS["eos"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=3, eos=2)
    for support in (SampledToken(), FullVocab(), TopK(1, closure="sampled_tail")):
        found = agreed.gradients_of(Objective(ReverseKL(), support, CREDITS[kind], reduction=Constant(1.0)))
        assert found.abs().max() < 1e-13


def test_sequence_mean_divides_by_the_sampled_length_and_is_not_the_gradient_of_the_mean() -> None:
    """The gradient of E mean_t Delta_t multiplies *every* score by the whole mean; 1/|y| return-to-go does not."""
    book, at = Book(WORLDS["eos"]), WORLDS["eos"]

    def scaled(path: Path) -> list[float]:
        rewards = book.rewards(path)
        return [sum(rewards[t:]) / len(rewards) for t in range(len(rewards))]

    found = at.gradients_of(Objective(ReverseKL(), SampledToken(), ReturnToGo(), reduction=SequenceMean()))
    close(found, book.scores(scaled), 1e-12)
    law, total = at.student.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for path in at.paths:
        logs = [law[s, v] for s, v in zip(path.states, path.tokens, strict=True)]
        gaps = [x - math.log(book.q[s][v]) for x, s, v in zip(logs, path.states, path.tokens, strict=True)]
        total = total + sum(logs).exp() * sum(gaps) / len(gaps)
    (true,) = torch.autograd.grad(total, at.student)
    correct = book.scores(lambda path: [sum(book.rewards(path)) / len(path.tokens) - 1 / len(path.tokens)] * len(path.tokens))
    close(book.mean(correct), true)
    assert (book.mean(found) - true).norm() > 1e-2


# ---- identities ----------------------------------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_discounted_credit_is_the_local_gradient_plus_the_couplings(name: str, gamma: float) -> None:
    """C_k = E sum_t r_{t+k} grad log p(y_t) = - E sum_t KL(s_{t+k}) grad log p(y_t), weighted by gamma^k."""
    at, book = WORLDS[name], Book(WORLDS[name])
    expected = at.moments_of(sampled(Immediate())).mean
    for k in range(1, at.horizon):
        rewards = book.mean(book.scores(lambda y, k=k: [*book.rewards(y)[k:], *[0.0] * k][: len(y.tokens)]))
        exact = book.mean(book.scores(lambda y, k=k: [*[-x for x in book.kls(y)[k:]], *[0.0] * k][: len(y.tokens)]))
        close(rewards, exact)
        expected = expected + gamma**k * rewards
    close(at.moments_of(sampled(Discounted(gamma))).mean, expected)


class Arbitrary(Baseline):
    """Any function of the two laws of a state."""

    title = "arbitrary"

    def value(self, divergence: object, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 5.0 * (17.0 * student + 29.0 * teacher**2).sin().sum(-1)


@each_world
@pytest.mark.parametrize("credit", [Immediate(), Discounted(0.5), ReturnToGo(analytic=True)], ids=repr)
def test_any_function_of_the_state_is_a_baseline_and_one_of_the_action_is_not(name: str, credit: object) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    plain = at.moments_of(sampled(credit))
    shifted = at.moments_of(sampled(credit, Arbitrary()))
    close(shifted.mean, plain.mean)
    assert shifted.trace > 2 * plain.trace
    of_action = book.mean(book.scores(lambda y: [math.sin(3.0 * s + v) for s, v in zip(y.states, y.tokens, strict=True)]))
    assert of_action.abs().max() > 1e-2


@each_world
def test_raw_signals_are_net_negative_by_the_kl_and_balanced_by_the_closed_form(name: str) -> None:
    student, teacher = (law.detach() for law in WORLDS[name].laws())
    signal = ReverseKL().advantage(student, teacher)
    kl = torch.tensor([Book(WORLDS[name]).kl(s) for s in range(len(student))], dtype=torch.float64)
    below, above = ((student.exp() * part).sum(-1) for part in (signal.clamp(max=0.0), signal.clamp(min=0.0)))
    close(-below - above, kl)
    baseline = ClosedFormBaseline().value(ReverseKL(), student, teacher)
    close(baseline, -kl)
    close((student.exp() * (signal - baseline[:, None])).sum(-1), torch.zeros_like(kl))
