"""Counterfactual routes: the direction of every token, its mean, its variance, and that a routed step never hurts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    Constant,
    CounterfactualRoute,
    DegenerateObjective,
    FullVocab,
    GeneralizedJSD,
    Immediate,
    NoBaseline,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Tanh,
    TopKBaseline,
    Vanilla,
)
from opd_lightning.objectives.routes import Routed
from opd_lightning.objectives.supports import World
from opd_lightning.types import Completion, Prompt, Rollout
from tests.objectives.textbook import Book, close, world, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def routed(route: object, baseline: object = ClosedFormBaseline(), credit: object = Immediate(), **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(), credit, baseline, Constant(1.0), route=route, **axes)


def canonical(strength: float, balanced: bool = True, **keys: float) -> Objective:
    return routed(CounterfactualRoute("canonical", strength, balanced, **keys))


Row = list[float]


def canonical_destination(p: Row, q: Row, drawn: int) -> Row | None:
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    size = [a * max(math.log(b / a) + kl, 0.0) for a, b in zip(p, q, strict=True)]
    return [x / sum(size) for x in size] if sum(size) > 0 else None


def geometric_destination(p: Row, q: Row, drawn: int, alpha: float = 0.3, margin: float = 0.2, most: float = 4.0) -> Row | None:
    size = [
        a ** (1 - alpha) * b**alpha if v != drawn and math.log(b / a) > margin and b <= most * a else 0.0
        for v, (a, b) in enumerate(zip(p, q, strict=True))
    ]
    return [x / sum(size) for x in size] if sum(size) > 0 else None


def ascent(p: Row, c: Row | None, advantage: float, drawn: int, strength: float, balanced: bool) -> Row:
    """Of the logits: |A| ((1 - w) p + w c - e) where A < 0, k A (e - p) elsewhere."""
    w = strength if c is not None else 0.0
    c = c or [0.0] * len(p)
    onehot = [float(v == drawn) for v in range(len(p))]
    if advantage < 0:
        return [-advantage * ((1 - w) * x + w * y - e) for x, y, e in zip(p, c, onehot, strict=True)]
    return [(1 - w if balanced else 1.0) * advantage * (e - x) for x, e in zip(p, onehot, strict=True)]


@each_world
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("destination", ["canonical", "geometric"])
def test_direction_of_every_token_by_definition(name: str, destination: str, strength: float, balanced: bool) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    choose = canonical_destination if destination == "canonical" else geometric_destination
    expected, fallbacks = torch.zeros(len(at.paths), *at.teacher.shape, dtype=torch.float64), 0
    for i, path in enumerate(at.paths):
        for s, v in zip(path.states, path.tokens, strict=True):
            c = choose(book.p[s], book.q[s], v)
            fallbacks += c is None
            up = ascent(book.p[s], c, book.r(s, v) + book.kl(s), v, strength, balanced)
            expected[i, s] -= torch.tensor(up, dtype=torch.float64)
    route = CounterfactualRoute(destination, strength, balanced, alpha=0.3, margin=0.2, max_ratio=4.0)
    found = at.gradients_of(routed(route))
    close(found, expected, 1e-12)
    assert found.sum(-1).abs().max() < 1e-13  # a direction of logits sums to zero
    assert (fallbacks > 0) == (destination == "geometric")


@each_world
def test_strength_zero_and_closed_gates_are_the_plain_gradient(name: str) -> None:
    at = WORLDS[name]
    idle = routed(CounterfactualRoute("canonical", 0.0, True), TopKBaseline(2))
    assert idle.declared_target.biases == routed(Vanilla(), TopKBaseline(2)).declared_target.biases == ()
    plain = at.gradients_of(routed(Vanilla()))
    for destination in ("canonical", "geometric"):
        for balanced in (False, True):
            for closed in ({"strength": 0.0}, {"min_support": 1.0}, {"max_teacher_entropy": 0.0}):
                route = CounterfactualRoute(destination, **{"strength": 1.0, "balanced": balanced} | closed)
                close(at.gradients_of(routed(route)), plain, 1e-13)


@each_world
def test_a_gate_closes_state_by_state(name: str) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    entropy = [-sum(x * math.log(x) for x in row) for row in book.q]
    bound = sorted(entropy)[len(entropy) // 2]
    plain, open_ = at.gradients_of(routed(Vanilla())), at.gradients_of(canonical(0.7))
    for s, h in enumerate(entropy):
        found = at.gradients_of(canonical(0.7, max_teacher_entropy=bound + 1e-9))[:, s]
        close(found, (open_ if h <= bound else plain)[:, s], 1e-14)
    for s in range(len(book.p)):
        mass = sum(q for v, q in enumerate(book.q[s]) if book.r(s, v) + book.kl(s) > 0)
        found = at.gradients_of(canonical(0.7, min_support=0.6))[:, s]
        close(found, (open_ if mass >= 0.6 else plain)[:, s], 1e-14)


@each_world
def test_canonical_theorem_the_negative_events_alone_are_the_exact_gradient(name: str) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    exact = at.moments_of(Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0))).mean
    for s, row in enumerate(book.p):
        c = canonical_destination(row, book.q[s], 0)
        up = [0.0] * len(row)
        for v, p in enumerate(row):
            if book.r(s, v) + book.kl(s) < 0:
                up = [x + p * y for x, y in zip(up, ascent(row, c, book.r(s, v) + book.kl(s), v, 1.0, True), strict=True)]
        visits = sum(path.student for path in at.paths if s in path.states)
        close(exact[s], -visits * torch.tensor(up, dtype=torch.float64))
    found = at.gradients_of(canonical(1.0))
    close(book.mean(found), exact)
    for path, gradient in zip(at.paths, found, strict=True):  # and the positive ones do nothing
        for s, v in zip(path.states, path.tokens, strict=True):
            assert book.r(s, v) + book.kl(s) < 0 or gradient[s].abs().max() < 1e-14


@each_world
@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_balanced_canonical_routes_are_unbiased(name: str, strength: float) -> None:
    at, objective = WORLDS[name], canonical(strength)
    assert objective.declared_target.biases == ()
    close(at.moments_of(objective).mean, at.declared_gradient(objective))
    close(at.moments_of(objective).mean, at.moments_of(Objective(ReverseKL(), reduction=Constant(1.0))).mean)
    gae = routed(CounterfactualRoute("canonical", strength, True), NoBaseline(), GAE(0.0, 0.5))
    close(at.moments_of(gae).mean, at.moments_of(objective).mean)


@pytest.mark.parametrize(
    "axes",
    [{"baseline": TopKBaseline(2)}, {"credit": ReturnToGo()}, {"shaper": Tanh(0.5)}],
    ids=["another baseline", "another credit", "a shaper"],
)
def test_balance_is_lost_with_any_other_signal_and_that_is_declared(axes: dict) -> None:
    at = WORLDS["fixed"]
    balanced = routed(CounterfactualRoute("canonical", 1.0, True), **axes)
    plain = routed(Vanilla(), **axes)
    assert (at.moments_of(balanced).mean - at.moments_of(plain).mean).abs().max() > 1e-3
    assert any("balances local advantages alone" in bias for bias in balanced.declared_target.biases)


@each_world
def test_bias_of_the_unbalanced_canonical_route(name: str) -> None:
    """+ w M (c - p) per visit: cross entropy to the destinations, with the suppressed mass M as its size."""
    at, book = WORLDS[name], Book(WORLDS[name])
    for strength in (0.3, 1.0):
        bias = torch.zeros_like(at.teacher)
        for s, row in enumerate(book.p):
            c = canonical_destination(row, book.q[s], 0)
            mass = 0.5 * sum(p * abs(book.r(s, v) + book.kl(s)) for v, p in enumerate(row))
            visits = sum(path.student for path in at.paths if s in path.states)
            bias[s] = (
                -visits * strength * mass * (torch.tensor(c, dtype=torch.float64) - torch.tensor(row, dtype=torch.float64))
            )
        shift = at.moments_of(canonical(strength, balanced=False)).mean - at.moments_of(routed(Vanilla())).mean
        close(shift, bias)
        assert canonical(strength, balanced=False).declared_target.biases


def test_balancing_lowers_the_variance_and_plain_routing_raises_it() -> None:
    """Every trace is that of 20 random worlds together; the exact sum has the least."""

    def trace(objective: Objective) -> float:
        return sum(at.moments_of(objective).trace for at in many)

    many = [world(4, 2, seed) for seed in range(20)]
    balanced = {w: trace(canonical(w)) for w in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert balanced[0.0] > balanced[0.25] > balanced[1.0] > balanced[0.5] > balanced[0.75]
    assert trace(canonical(1.0, balanced=False)) > balanced[0.0]
    for at in many:
        assert at.moments_of(canonical(0.5)).trace < at.moments_of(routed(Vanilla())).trace
    assert trace(Objective(ReverseKL(), reduction=Constant(1.0))) < balanced[0.75]


def test_of_two_tokens_the_other_one_is_the_only_destination() -> None:
    at = world(2, 3, seed=4)
    book, plain = Book(at), at.gradients_of(routed(Vanilla()))
    for destination in ("canonical", "geometric"):
        found = at.gradients_of(routed(CounterfactualRoute(destination, 1.0, max_ratio=1e9)))
        for i, path in enumerate(at.paths):
            for s, v in zip(path.states, path.tokens, strict=True):
                factor = 1.0 / (1.0 - book.p[s][v]) if book.r(s, v) + book.kl(s) < 0 else 1.0
                close(found[i, s], factor * plain[i, s], 1e-12)


@pytest.mark.parametrize("destination", ["canonical", "geometric"])
def test_nothing_moves_where_both_agree(destination: str) -> None:
    table = WORLDS["eos"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=3, eos=2)
    assert agreed.gradients_of(routed(CounterfactualRoute(destination, 1.0))).abs().max() < 1e-13


def single_tokens(student: torch.Tensor, teacher: torch.Tensor, drawn: torch.Tensor, objective: Objective) -> torch.Tensor:
    """(N, V) ascent direction of every row of logits, one drawn token each."""
    logs = student.log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
    written = [Completion((int(v),), (float(x),), True, 0) for v, x in zip(drawn, logs, strict=True)]
    rollout = replace(Rollout.of([Prompt(0, "", (1,))] * len(written), written, 0), sampler_logprobs=logs[:, None])
    rows = student.clone().requires_grad_(True)
    loss = objective(TableLaws(rows), TableLaws(teacher), rollout).loss * len(written)
    return -torch.autograd.grad(loss, rows)[0]


def slope_of_kl(student: torch.Tensor, teacher: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    p, q = student.softmax(-1), teacher.softmax(-1)
    gap = (p / q).log()
    return (p * (gap - (p * gap).sum(-1, keepdim=True)) * direction).sum(-1)


DRAWS = 10_000


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), vocab=st.integers(3, 8), scale=st.floats(0.2, 3.0))
def test_of_ten_thousand_routed_steps_none_raises_the_divergence(seed: int, vocab: int, scale: float) -> None:
    """The per-sample descent theorem: 10 000 laws and draws an example, and no suppressed token whose full routing does not
    descend KL(student || teacher). Of the same draws the plain gradient raises it for some.
    """
    generator = torch.Generator().manual_seed(seed)
    z, w = scale * torch.randn(2, DRAWS, vocab, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
    p, q = z.softmax(-1), w.softmax(-1)
    raw = (q / p).log().gather(-1, drawn[:, None]).squeeze(-1)
    suppressed = raw + (p * (p / q).log()).sum(-1) < -1e-6
    assert suppressed.sum() > DRAWS / 10
    for objective in (canonical(1.0), routed(CounterfactualRoute("geometric", 1.0, max_ratio=1e300))):
        assert (slope_of_kl(z, w, single_tokens(z, w, drawn, objective))[suppressed] < 0).all()
    plain = slope_of_kl(z, w, single_tokens(z, w, drawn, routed(Vanilla(), NoBaseline())))
    assert (plain[raw < 0] > 1e-12).any()


def test_the_plain_gradient_and_a_raw_trigger_raise_it_now_and_then() -> None:
    """Shares of negative events that raise the divergence; the raw trigger is refused for it."""
    generator = torch.Generator().manual_seed(0)
    z, w = 1.5 * torch.randn(2, DRAWS, 6, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
    p, q = z.softmax(-1), w.softmax(-1)
    raw = (q / p).log().gather(-1, drawn[:, None]).squeeze(-1)
    centred = raw + (p * (p / q).log()).sum(-1)
    route = CounterfactualRoute("canonical", 1.0)
    with pytest.raises(DegenerateObjective, match="one routed step in ten"):
        routed(route, NoBaseline())
    shares = {}
    for name, objective, signal in (
        ("plain", routed(Vanilla(), NoBaseline()), raw),
        ("plain, baseline", routed(Vanilla()), centred),
        ("routed, raw", routed(route, NoBaseline(), allow_degenerate=True), raw),
        ("routed", routed(route), centred),
    ):
        negative = signal < 0
        up = slope_of_kl(z, w, single_tokens(z, w, drawn, objective)) > 1e-12
        shares[name] = float(up[negative].double().mean())
    assert shares["plain"] == pytest.approx(0.303, abs=0.03)
    assert shares["plain, baseline"] == pytest.approx(0.094, abs=0.03)
    assert shares["routed, raw"] == pytest.approx(0.098, abs=0.03)
    assert shares["routed"] == 0.0


# ---- the golden leak case ------------------------------------------------------------------------------------------------


P, Q = [0.70, 0.25, 0.04, 0.01], [0.05, 0.05, 0.85, 0.05]


def golden_step(objective: Objective) -> tuple[list[float], float]:
    """Ascent direction of one drawn token 0, and the divergence after a step of size 1."""
    p, q = torch.tensor([P], dtype=torch.float64), torch.tensor([Q], dtype=torch.float64)
    up = single_tokens(p.log(), q.log(), torch.tensor([0]), objective)
    after = (p.log() + up).softmax(-1)
    return up[0].tolist(), float((after * (after / q).log()).sum())


def test_golden_plain_gradient_leaks_to_what_the_teacher_rejects_too() -> None:
    up, after = golden_step(routed(Vanilla(), NoBaseline()))
    gains = [p * (u - sum(x * y for x, y in zip(P, up, strict=True))) for p, u in zip(P, up, strict=True)]
    assert up[1] / sum(up[1:]) == pytest.approx(0.833, abs=1e-3)
    assert gains[1] / sum(gains[1:]) == pytest.approx(0.917, abs=1e-3)
    assert gains[2] / sum(gains[1:]) == pytest.approx(0.069, abs=1e-3)
    assert after == pytest.approx(1.951, abs=1e-3)


@pytest.mark.parametrize(
    ("route", "destination", "divergence"),
    [
        (CounterfactualRoute("canonical", 1.0), (0.0, 0.340, 0.560, 0.101), 1.620),
        (CounterfactualRoute("geometric", 1.0, alpha=1.0), (0.0, 0.0, 0.944, 0.056), 0.371),
        (CounterfactualRoute("geometric", 1.0, alpha=0.5), (0.0, 0.0, 0.892, 0.108), 0.430),
    ],
    ids=lambda x: getattr(x, "title", None),
)
def test_golden_destinations(route: object, destination: tuple[float, ...], divergence: float) -> None:
    up, after = golden_step(routed(route, NoBaseline(), allow_degenerate=True))
    size = math.log(P[0] / Q[0])
    assert up[0] == pytest.approx(-size)
    assert [u / size for u in up[1:]] == pytest.approx(destination[1:], abs=1e-3)
    assert after == pytest.approx(divergence, abs=1e-3)


# ---- refused -------------------------------------------------------------------------------------------------------------


def test_routes_are_refused_where_they_would_be_idle_or_underived() -> None:
    route = CounterfactualRoute("canonical", 1.0)
    with pytest.raises(DegenerateObjective, match="only acts on sampled tokens"):
        Objective(ReverseKL(), FullVocab(), route=route)
    idle = Objective(ReverseKL(), FullVocab(), route=route, reduction=Constant(1.0), allow_degenerate=True)
    plain = Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0))
    close(WORLDS["eos"].gradients_of(idle), WORLDS["eos"].gradients_of(plain), 0.0)
    axes = {"support": SampledToken(), "baseline": ClosedFormBaseline(), "reduction": Constant(1.0)}
    balanced = CounterfactualRoute("canonical", 1.0, True)
    with pytest.raises(DegenerateObjective, match="derived for the reverse KL"):
        Objective(GeneralizedJSD(0.3), route=balanced, **axes)
    wrong = Objective(GeneralizedJSD(0.3), route=balanced, allow_degenerate=True, **axes)
    shift = WORLDS["eos"].moments_of(wrong).mean - WORLDS["eos"].moments_of(Objective(GeneralizedJSD(0.3), **axes)).mean
    assert shift.abs().max() > 1e-3  # another divergence is not balanced by the destinations of the reverse KL


class AsTheStudentLikes(CounterfactualRoute):
    """c = p."""

    def score(self, world: World, ahead: torch.Tensor | None = None) -> Routed:
        share = torch.full_like(world.student[:, 0], self.strength).detach()
        return Routed((world.student.detach().exp() * world.student).sum(-1), share)


@each_world
def test_routing_to_the_students_own_law_is_the_plain_gradient(name: str) -> None:
    plain = WORLDS[name].gradients_of(routed(Vanilla()))
    for strength in (0.3, 1.0):
        close(WORLDS[name].gradients_of(routed(AsTheStudentLikes("canonical", strength))), plain, 1e-13)


@pytest.mark.parametrize(
    ("route", "steps"),
    [
        (Vanilla(), 81),
        (CounterfactualRoute("canonical", 1.0), 43),
        (CounterfactualRoute("geometric", 1.0, alpha=0.5), 42),
        (CounterfactualRoute("geometric", 1.0, alpha=1.0), 43),
    ],
    ids=lambda x: getattr(x, "title", "") or "plain",
)
def test_golden_training_reaches_the_teacher_monotonically(route: object, steps: int) -> None:
    """Expected steps of size 1/2 from the golden state until KL < 0.01; routing halves their number."""
    z, q = torch.tensor(P, dtype=torch.float64).log(), torch.tensor(Q, dtype=torch.float64)
    kls: list[float] = []
    while not kls or kls[-1] >= 0.01:
        up = single_tokens(z.repeat(4, 1), q.log().repeat(4, 1), torch.arange(4), routed(route))
        z = z + 0.5 * (z.softmax(-1)[:, None] * up).sum(0)
        p = z.softmax(-1)
        kls.append(float((p * (p / q).log()).sum()))
        assert len(kls) < 200
    assert abs(len(kls) - steps) <= 2
    assert all(b < a for a, b in itertools.pairwise(kls))
