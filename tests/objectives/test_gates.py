"""Gates and shapers: each against its definition, and what they do to the expected gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from opd_lightning.inspect.oracle import Path, TableLaws, TabularWorld
from opd_lightning.objectives import (
    Clip,
    ClosedFormBaseline,
    Constant,
    DegenerateObjective,
    Disagreement,
    FirstTokens,
    Floor,
    ForwardKL,
    FullVocab,
    Gate,
    Immediate,
    NoShape,
    Objective,
    PositionDecay,
    PositionImportance,
    PowerDifference,
    Reliability,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Shaper,
    SkipFirst,
    SoftLog,
    Softsign,
    SpecialTokens,
    StudentEntropy,
    Tanh,
    TeacherConfidence,
    TeacherEntropy,
    TokenGap,
    WrittenToken,
)
from opd_lightning.types import Rollout
from tests.objectives.textbook import Book, close, reverse_kl, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def sampled(credit: object = Immediate(), **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(), credit, reduction=Constant(1.0), **axes)


def entropy(row: list[float]) -> float:
    return -sum(x * math.log(x) for x in row)


def top(values: list[float], share: float) -> list[float]:
    kept = sorted(range(len(values)), key=lambda t: -values[t])[: math.ceil(len(values) * share)]
    return [float(t in kept) for t in range(len(values))]


Weights = Callable[[Book, Path], list[float]]


def gaps(book: Book, path: Path) -> list[float]:
    return [book.q[s][v] - book.p[s][v] for s, v in zip(path.states, path.tokens, strict=True)]


def importance(book: Book, path: Path) -> list[float]:
    size = [abs(r) for r in book.rewards(path)]
    return [1 + 0.8 * (1 - sum(size[:t]) / sum(size)) for t in range(len(size))]


STATE: list[tuple[Gate, Weights]] = [
    (StudentEntropy(at_least=0.85), lambda b, y: [float(entropy(b.p[s]) >= 0.85) for s in y.states]),
    (StudentEntropy(at_least=0.6, at_most=0.95), lambda b, y: [float(0.6 <= entropy(b.p[s]) <= 0.95) for s in y.states]),
    (TeacherEntropy(at_most=0.8), lambda b, y: [float(entropy(b.q[s]) <= 0.8) for s in y.states]),
    (Disagreement(at_least=0.5), lambda b, y: [float(b.kl(s) >= 0.5) for s in y.states]),
    (TeacherConfidence(), lambda b, y: [1 - entropy(b.q[s]) / math.log(b.vocab) for s in y.states]),
    (PositionDecay(0.7), lambda b, y: [0.7**t for t in range(len(y.states))]),
    (SkipFirst(1), lambda b, y: [float(t >= 1) for t in range(len(y.states))]),
    (FirstTokens(2), lambda b, y: [float(t < 2) for t in range(len(y.states))]),
]
LOOKING_FURTHER: list[tuple[Gate, Weights]] = [
    (TokenGap(at_most=0.0), lambda b, y: [float(g <= 0) for g in gaps(b, y)]),
    (Reliability(), lambda b, y: [min(math.exp(r), 1.0) for r in b.rewards(y)]),
    (SpecialTokens([0, 1], first_only=False), lambda b, y: [float(v not in (0, 1)) for v in y.tokens]),
    (
        SpecialTokens([0, 1]),
        lambda b, y: [float(v not in (0, 1) or v in y.tokens[:t]) for t, v in enumerate(y.tokens)],
    ),
    (StudentEntropy(top_fraction=0.5), lambda b, y: top([entropy(b.p[s]) for s in y.states], 0.5)),
    (Disagreement(top_fraction=0.3), lambda b, y: top([b.kl(s) for s in y.states], 0.3)),
    (TokenGap(top_fraction=0.6), lambda b, y: top(gaps(b, y), 0.6)),
    (PositionImportance(0.8), importance),
]
CASES = [*STATE, *LOOKING_FURTHER]
named = pytest.mark.parametrize(("gate", "weights"), CASES, ids=lambda x: getattr(x, "title", ""))


def test_every_gate_of_the_package_is_here() -> None:
    def leaves(cls: type) -> set[type]:
        return set().union(*map(leaves, cls.__subclasses__())) if cls.__subclasses__() else {cls}

    assert {type(gate) for gate, _ in CASES} == leaves(Gate)
    assert {gate.depends_on for gate, _ in STATE} == {"state"}
    assert {gate.depends_on for gate, _ in LOOKING_FURTHER} == {"action", "trajectory"}


@each_world
@named
def test_a_gate_multiplies_every_token_by_its_definition(name: str, gate: Gate, weights: Weights) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    expected = book.scores(lambda y: [w * r for w, r in zip(weights(book, y), book.rewards(y), strict=True)])
    close(at.gradients_of(sampled(gates=[gate])), expected, 1e-12)


@each_world
def test_gates_multiply_each_other_and_the_credit(name: str) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])

    def advantages(path: Path) -> list[float]:
        rewards = book.rewards(path)
        both = zip(STATE[4][1](book, path), LOOKING_FURTHER[1][1](book, path), strict=True)
        return [a * b * sum(rewards[t:]) for t, (a, b) in enumerate(both)]

    close(at.gradients_of(sampled(ReturnToGo(), gates=[TeacherConfidence(), Reliability()])), book.scores(advantages), 1e-12)


@each_world
@pytest.mark.parametrize(("gate", "weights"), STATE, ids=lambda x: getattr(x, "title", ""))
def test_state_gates_descend_the_weighted_divergence(name: str, gate: Gate, weights: Weights) -> None:
    """The gradient of sum_s d(s) w(s) KL(s), from the exact sum and in the mean from samples, a baseline or none."""
    at, book = WORLDS[name], Book(WORLDS[name])
    law, total = at.student.softmax(-1), torch.zeros((), dtype=torch.float64)
    for path in at.paths:
        for s, w in zip(path.states, weights(book, path), strict=True):
            total = total + path.student * w * reverse_kl(law[s], torch.tensor(book.q[s], dtype=torch.float64))
    (exact,) = torch.autograd.grad(total, at.student)
    full = Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0), gates=[gate])
    for objective in (full, sampled(gates=[gate]), sampled(gates=[gate], baseline=ClosedFormBaseline())):
        close(at.moments_of(objective).mean, exact)
        close(at.declared_gradient(objective), exact)
        assert "states weigh as the gates say" in objective.declared_target.biases
    credited = sampled(ReturnToGo(), gates=[gate])
    close(at.moments_of(credited).mean, at.declared_gradient(credited))


@each_world
@pytest.mark.parametrize(("gate", "weights"), LOOKING_FURTHER, ids=lambda x: getattr(x, "title", ""))
def test_other_gates_follow_another_field_that_vanishes_at_the_teacher(name: str, gate: Gate, weights: Weights) -> None:
    at = WORLDS[name]
    objective = sampled(gates=[gate])
    assert any("not the gradient of a weighted divergence" in bias for bias in objective.declared_target.biases)
    with pytest.raises(ValueError, match="no closed form"):
        at.declared_gradient(objective)
    agreed = TabularWorld(at.student.detach(), at.student.detach().clone(), at.horizon, at.eos)
    assert agreed.moments_of(objective).mean.abs().max() < 1e-13
    if gate.depends_on == "action":
        # a baseline is no longer neutral: the gate decides which of its terms are left
        shift = at.moments_of(sampled(gates=[gate], baseline=ClosedFormBaseline())).mean - at.moments_of(objective).mean
        assert shift.abs().max() > 1e-3


def test_the_field_of_an_action_gate() -> None:
    """p (m r - mean of m r) per visit: a covariance, not the gradient of the gated divergence."""
    at, book = WORLDS["fixed"], Book(WORLDS["fixed"])
    expected = torch.zeros_like(at.teacher)
    for path in at.paths:
        for s in path.states:
            gated = [min(math.exp(book.r(s, v)), 1.0) * book.r(s, v) for v in range(book.vocab)]
            mean = sum(p * g for p, g in zip(book.p[s], gated, strict=True))
            field = [-p * (g - mean) for p, g in zip(book.p[s], gated, strict=True)]
            expected[s] += path.student * torch.tensor(field, dtype=torch.float64)
    close(at.moments_of(sampled(gates=[Reliability()])).mean, expected)


@named
def test_gates_look_at_their_own_completion_alone(gate: Gate, weights: Weights) -> None:
    """One row after another or all at once."""
    at = WORLDS["eos"]
    objective = sampled(gates=[gate])
    together = at.gradients_of(objective)
    for i, path in enumerate(at.paths):
        states = torch.tensor(path.states)
        rows = at.student.detach()[states].requires_grad_(True)
        loss = objective(TableLaws(rows), TableLaws(at.teacher[states]), at.rollout(path)).loss
        close(torch.autograd.grad(loss, rows)[0], together[i, states], 1e-13)


def test_shares_of_a_completion_are_rounded_up_without_rounding_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 7, 25, 50, 100):
        for percent in (1, 30, 54, 60, 99):
            logits = torch.randn(n, 4, generator=generator)
            at = Objective(ReverseKL(), FullVocab(), gates=[StudentEntropy(top_fraction=percent / 100)])
            loss = at(TableLaws(logits), TableLaws(torch.zeros(n, 4)), one_row(n)).token_loss
            assert int((loss != 0).sum()) == math.ceil(Fraction(percent, 100) * n), (n, percent)


def one_row(n: int) -> Rollout:
    from opd_lightning.types import Completion, Prompt

    return Rollout.of([Prompt(0, "", (1,))], [Completion((2,) * n, (-1.0,) * n, True, 0)], 0)


def test_refused_gates_are_idle() -> None:
    with pytest.raises(DegenerateObjective, match="PositionImportance follows"):
        Objective(ReverseKL(), FullVocab(), gates=[PositionImportance(0.5)])
    idle = Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0), gates=[PositionImportance(0.5)], allow_degenerate=True)
    plain = WORLDS["eos"].gradients_of(Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0)))
    close(WORLDS["eos"].gradients_of(idle), 1.5 * plain, 1e-12)
    for gate, _ in CASES:
        if gate.needs_teacher:
            with pytest.raises(DegenerateObjective, match="no teacher's law"):
                Objective(ForwardKL(), WrittenToken(), gates=[gate])
        else:
            assert Objective(ForwardKL(), WrittenToken(), gates=[gate]).declared_target.defect is None


def test_gates_without_a_teacher_weigh_the_likelihood_of_a_text() -> None:
    at, book = WORLDS["eos"], Book(WORLDS["eos"])
    for gate, weights in CASES:
        if not gate.needs_teacher:
            objective = Objective(ForwardKL(), WrittenToken(), reduction=Constant(1.0), gates=[gate])
            close(at.gradients_of(objective, "teacher"), book.scores(lambda y, w=weights: w(book, y)), 1e-12)


# ---- shapers -------------------------------------------------------------------------------------------------------------


SHAPERS: list[tuple[Shaper, Callable[[float, float, float], float]]] = [
    (NoShape(), lambda r, p, q: r),
    (Clip(0.4), lambda r, p, q: max(-0.4, min(0.4, r))),
    (Floor(0.4), lambda r, p, q: max(r, math.log(0.4 / 0.6))),
    (Softsign(0.7), lambda r, p, q: r / (0.7 + abs(r))),
    (Tanh(0.7), lambda r, p, q: 0.7 * math.tanh(r / 0.7)),
    (SoftLog(), lambda r, p, q: math.copysign(math.log(1 + abs(r)), r)),
    (PowerDifference(0.5), lambda r, p, q: (q**0.5 - p**0.5) / 0.5),
]
each_shaper = pytest.mark.parametrize(("shaper", "phi"), SHAPERS, ids=lambda x: type(x).__name__)


def test_every_shaper_of_the_package_is_here() -> None:
    assert {type(shaper) for shaper, _ in SHAPERS} == set(Shaper.__subclasses__())


@each_world
@each_shaper
@pytest.mark.parametrize("credit", [Immediate(), ReturnToGo(), ReturnToGo(analytic=True)], ids=repr)
def test_a_shaper_bends_the_signal_before_credit_is_given(name: str, shaper: Shaper, phi: Callable, credit: object) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])

    def bent(s: int, v: int) -> float:
        return phi(book.r(s, v), book.p[s][v], book.q[s][v])

    def advantages(path: Path) -> list[float]:
        own = [bent(s, v) for s, v in zip(path.states, path.tokens, strict=True)]
        means = [sum(p * bent(s, v) for v, p in enumerate(book.p[s])) for s in path.states]
        after = means if credit.analytic else own
        return [x + (sum(after[t + 1 :]) if credit.gamma else 0.0) for t, x in enumerate(own)]

    objective = sampled(credit, shaper=shaper)
    close(at.gradients_of(objective), book.scores(advantages), 1e-12)
    close(at.moments_of(objective).mean, at.declared_gradient(objective))
    assert any("the signal is bent" in b for b in objective.declared_target.biases) == bool(shaper.title)


@each_shaper
def test_shapers_keep_sign_order_and_fixed_point(shaper: Shaper, phi: Callable) -> None:
    student = torch.full((201,), math.log(0.2), dtype=torch.float64)
    reward = torch.arange(-100, 101, dtype=torch.float64) / 64
    found = shaper.shape(reward, student, student + reward)
    assert (found.diff() >= 0).all()
    assert (found.sign() == reward.sign()).all()
    assert found[100] == 0.0
    if not isinstance(shaper, (Floor, PowerDifference)):
        close(found, -found.flip(0), 1e-12)


@each_shaper
def test_bent_signals_still_descend_in_the_natural_metric(shaper: Shaper, phi: Callable) -> None:
    """Cov_p(r, phi(r)) >= 0 for a monotone phi of r, so the mean natural step never raises the divergence."""
    if isinstance(shaper, PowerDifference):
        return  # not a function of r alone
    for at in WORLDS.values():
        book = Book(at)
        for s, row in enumerate(book.p):
            bent = [phi(book.r(s, v), row[v], book.q[s][v]) for v in range(book.vocab)]
            means = sum(p * x for p, x in zip(row, bent, strict=True)), -book.kl(s)
            assert (
                sum(p * (x - means[0]) * (book.r(s, v) - means[1]) for v, (p, x) in enumerate(zip(row, bent, strict=True))) >= 0
            )
