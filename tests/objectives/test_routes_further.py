"""Routes in a coarsened vocabulary, in probability space and with look-ahead.

What is proven:

- natural routing moves mass from a to c and nowhere else: `test_probability_space_moves_mass_to_the_destinations_alone`;
- its canonical directions add up to the natural gradient: `test_canonical_directions_add_up_to_the_natural_gradient`;
- canonical routes with Q - V give the sequence level: `test_balanced_look_ahead_is_the_gradient_of_completions`;
- directions, bias, balance, variance and descent of test_routes.py with a tail entry: `test_coarse_*`;
- entries must depend on the state alone: `test_a_coarsening_that_holds_the_drawn_token_is_biased`.
"""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.inspect.oracle import TabularWorld
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    Constant,
    CounterfactualRoute,
    DegenerateObjective,
    FullVocab,
    Immediate,
    NoBaseline,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    TopK,
    Vanilla,
)
from opd_lightning.objectives.supports import World
from opd_lightning.objectives.validate import refuse_unfit_source
from opd_lightning.ops import logprobs as lp
from tests.objectives.test_routes import (
    P,
    ascent,
    canonical_destination,
    geometric_destination,
    golden_step,
    routed,
    single_tokens,
    slope_of_kl,
)
from tests.objectives.textbook import Book, close, reverse_kl, world, worlds

Row = list[float]
WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)

# ---- a top-k world with a tail entry -------------------------------------------------------------------------------------

COARSE = {"fixed": world(6, 2, seed=8), "eos": world(5, 3, seed=9, eos=4)}
each_coarse = pytest.mark.parametrize("name", COARSE)


def coarse(route: object, k: int = 1, baseline: object = ClosedFormBaseline(), **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(k), Immediate(), baseline, Constant(1.0), route=route, **axes)


class Buckets:
    """The k likeliest tokens of both laws of a state, and a tail."""

    def __init__(self, p: Row, q: Row, k: int) -> None:
        head = {v for law in (p, q) for v in sorted(range(len(p)), key=lambda v: -law[v])[:k]}
        self.of = [sorted(head).index(v) if v in head else len(head) for v in range(len(p))]
        self.p, self.q = (
            [sum(x for x, b in zip(law, self.of, strict=True) if b == j) for j in range(len(head) + 1)] for law in (p, q)
        )
        self.tail, self.full = len(head), p

    def r(self, v: int) -> float:
        return math.log(self.q[self.of[v]] / self.p[self.of[v]])

    def kl(self) -> float:
        return sum(p * math.log(p / q) for p, q in zip(self.p, self.q, strict=True))

    def spread(self, c: Row) -> Row:
        """An entry's share, over its tokens as the student has them: the gradient of sum_j c_j log p_j, plus p."""
        return [c[b] * p / self.p[b] for p, b in zip(self.full, self.of, strict=True)]


def buckets(at: TabularWorld, k: int = 1) -> list[Buckets]:
    book = Book(at)
    return [Buckets(p, q, k) for p, q in zip(book.p, book.q, strict=True)]


def coarse_kl(at: TabularWorld, k: int = 1) -> torch.Tensor:
    """Gradient of sum_s d(s) KL_b(s), visits held fixed; the entries do not depend on the drawn token."""
    law, total = at.student.softmax(-1), torch.zeros((), dtype=torch.float64)
    for s, here in enumerate(buckets(at, k)):
        visits = sum(path.student for path in at.paths if s in path.states)
        entries = torch.zeros(here.tail + 1, dtype=torch.float64).index_add(0, torch.tensor(here.of), law[s])
        total = total + visits * (entries * (entries / torch.tensor(here.q, dtype=torch.float64)).log()).sum()
    return torch.autograd.grad(total, at.student)[0]


@each_coarse
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("destination", ["canonical", "geometric"])
def test_coarse_direction_of_every_token_by_definition(name: str, destination: str, balanced: bool) -> None:
    """The tail may be a canonical destination, never a geometric one; a token of the tail has the tail's log-ratio."""
    at, book, here = COARSE[name], Book(COARSE[name]), buckets(COARSE[name])
    expected, seen = torch.zeros(len(at.paths), *at.teacher.shape, dtype=torch.float64), set()
    for i, path in enumerate(at.paths):
        for s, v in zip(path.states, path.tokens, strict=True):
            b = here[s]
            if destination == "canonical":
                c = canonical_destination(b.p, b.q, b.of[v])
            else:
                c = geometric_destination(b.p[: b.tail], b.q[: b.tail], b.of[v])
                c = None if c is None else [*c, 0.0]
            seen.add((b.of[v] == b.tail, c is not None and c[-1] > 0))
            up = ascent(book.p[s], None if c is None else b.spread(c), b.r(v) + b.kl(), v, 0.7, balanced)
            expected[i, s] -= torch.tensor(up, dtype=torch.float64)
    route = CounterfactualRoute(destination, 0.7, balanced, alpha=0.3, margin=0.2, max_ratio=4.0)
    found = at.gradients_of(coarse(route))
    close(found, expected, 1e-12)
    assert found.sum(-1).abs().max() < 1e-13
    assert seen >= ({(True, True), (False, True), (False, False)} if destination == "canonical" else {(True, False)})


@each_coarse
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_coarse_balanced_routes_descend_the_coarse_divergence(name: str, strength: float) -> None:
    at, objective = COARSE[name], coarse(CounterfactualRoute("canonical", strength, True))
    close(at.moments_of(objective).mean, coarse_kl(at))
    close(at.declared_gradient(objective), coarse_kl(at))
    assert "coarsening" in objective.declared_target.name and "lower bound" in str(objective.declared_target)
    assert (coarse_kl(at) - at.gradient(lambda s, t: (s.exp() * (s - t)).sum(-1), 0.0)).abs().max() > 1e-3
    if strength == 1.0:  # the negative events alone
        here = buckets(at)
        for path, gradient in zip(at.paths, at.gradients_of(objective), strict=True):
            for s, v in zip(path.states, path.tokens, strict=True):
                assert here[s].r(v) + here[s].kl() < 0 or gradient[s].abs().max() < 1e-14


@each_coarse
def test_coarse_bias_of_the_unbalanced_route(name: str) -> None:
    """+ w M (c - p) per visit, as in the full vocabulary, the tail's share spread over its tokens."""
    at, bias = COARSE[name], torch.zeros_like(COARSE[name].teacher)
    for s, b in enumerate(buckets(at)):
        mass = 0.5 * sum(p * abs(math.log(q / p) + b.kl()) for p, q in zip(b.p, b.q, strict=True))
        c = canonical_destination(b.p, b.q, 0)
        assert c is not None
        visits = sum(path.student for path in at.paths if s in path.states)
        pull = torch.tensor(b.spread(c), dtype=torch.float64) - torch.tensor(b.full, dtype=torch.float64)
        bias[s] = -visits * 0.6 * mass * pull
    objective = coarse(CounterfactualRoute("canonical", 0.6))
    close(at.moments_of(objective).mean - at.moments_of(coarse(Vanilla())).mean, bias)
    assert any("adds a pull" in b for b in objective.declared_target.biases)


def test_coarse_balancing_lowers_the_variance_and_plain_routing_raises_it() -> None:
    many = [world(6, 1, seed) for seed in range(20)]

    def trace(strength: float, balanced: bool = True) -> float:
        route = CounterfactualRoute("canonical", strength, balanced)
        return sum(at.moments_of(coarse(route)).trace for at in many)

    assert trace(0.0) > trace(0.25) > trace(0.75) > trace(0.5)
    assert trace(1.0, balanced=False) > trace(0.0)


def test_coarse_limits() -> None:
    """No tail left: the full vocabulary. Closed gates: the plain gradient. Equal models: nothing."""
    at = COARSE["fixed"]
    route = CounterfactualRoute("canonical", 0.5, True)
    close(at.gradients_of(coarse(route, k=6)), at.gradients_of(coarse(route, k=0)), 1e-12)
    for closed in ({"strength": 0.0}, {"min_support": 1.0}, {"max_teacher_entropy": 0.0}):
        for destination in ("canonical", "geometric"):
            shut = CounterfactualRoute(destination, **{"strength": 1.0} | closed)
            close(at.gradients_of(coarse(shut)), at.gradients_of(coarse(Vanilla())), 1e-13)
    agreed = TabularWorld(at.student.detach(), at.student.detach(), at.horizon)
    assert agreed.gradients_of(coarse(route)).abs().max() < 1e-13


def test_coarse_routed_steps_never_raise_the_coarse_divergence() -> None:
    """10 000 draws without a violation; the plain gradient has them."""
    generator = torch.Generator().manual_seed(1)
    z, w = 1.5 * torch.randn(2, 10_000, 8, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
    ours, theirs, entry, _ = SampledToken(2).world(z.log_softmax(-1), w.log_softmax(-1), drawn)
    gain = theirs - ours + (ours.exp() * (ours - theirs)).sum(-1, keepdim=True)
    z.requires_grad_(True)
    coarsened, aim, _, _ = SampledToken(2).world(z.log_softmax(-1), w.log_softmax(-1), drawn)
    (uphill,) = torch.autograd.grad((coarsened.exp() * (coarsened - aim)).sum(), z)
    z = z.detach()
    negative = lp.gather(gain, entry) < -1e-6
    alternatives = ((theirs - ours)[:, :-1] > 0).any(-1)  # the tail is none for a geometric route, which then is the plain one
    raised = {}
    for title, objective in (
        ("routed", coarse(CounterfactualRoute("canonical", 1.0), k=2)),
        ("geometric", coarse(CounterfactualRoute("geometric", 1.0, max_ratio=1e300), k=2)),
        ("plain", coarse(Vanilla(), k=2)),
    ):
        slope = (uphill * single_tokens(z, w, drawn, objective)).sum(-1)
        counted = negative & alternatives if title == "geometric" else negative
        raised[title] = int((slope[counted] > 1e-12).sum())
    assert (negative & alternatives).sum() > 3000
    assert raised["routed"] == 0 and raised["plain"] > 100
    assert raised["geometric"] == 0


class Appended(SampledToken):
    """The coarsening with the drawn token as an entry of its own: it depends on the action."""

    def world(self, student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> World:
        ids, counts, _, _ = TopK(self.k, "union", "tail").closed(student, teacher)
        new = ~(ids == tokens[:, None]).any(-1, keepdim=True)
        ids, counts = torch.cat([ids, tokens[:, None]], -1), torch.cat([counts, new], -1)
        heads = [law.gather(-1, ids).where(counts, lp.floor_of(law.dtype)) for law in (student, teacher)]
        laws = [torch.cat([head, lp.tail_logmass(head)[:, None]], -1) for head in heads]
        return World(*laws, (ids == tokens[:, None]).int().argmax(-1), tail=True)


@each_coarse
def test_a_coarsening_that_holds_the_drawn_token_is_biased(name: str) -> None:
    """Its baseline and its destinations look at the action. Only the bare log-ratio, exact for every token, stays unbiased."""
    at, axes = COARSE[name], {"reduction": Constant(1.0)}
    full = at.moments_of(Objective(ReverseKL(), FullVocab(), **axes)).mean
    close(at.moments_of(Objective(ReverseKL(), Appended(1), **axes)).mean, full)
    for strength in (0.0, 0.5, 1.0):
        route = CounterfactualRoute("canonical", strength, True)
        found = at.moments_of(Objective(ReverseKL(), Appended(1), baseline=ClosedFormBaseline(), route=route, **axes)).mean
        assert (found - full).abs().max() > 1e-3 and (found - coarse_kl(at)).abs().max() > 1e-3


# ---- probability space ---------------------------------------------------------------------------------------------------


def natural(destination: str = "canonical", strength: float = 1.0, max_ratio: float = 1e300, **keys: float) -> Objective:
    return routed(CounterfactualRoute(destination, strength, max_ratio=max_ratio, space="probability", **keys))


def moved(p: Row, up: torch.Tensor) -> torch.Tensor:
    """First-order change of the probabilities along a direction of logits."""
    law = torch.tensor(p, dtype=torch.float64)
    return law * (up - (law * up).sum())


@each_world
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("destination", ["canonical", "geometric"])
def test_probability_space_moves_mass_to_the_destinations_alone(name: str, destination: str, strength: float) -> None:
    """|A| p_a (c - e_a) to first order, on the share that is routed; the plain step on the rest and on positive events."""
    at, book, suppressed = WORLDS[name], Book(WORLDS[name]), 0
    found = at.gradients_of(natural(destination, strength, alpha=0.3))
    plain = at.gradients_of(routed(Vanilla()))
    assert found.sum(-1).abs().max() < 1e-12
    for i, path in enumerate(at.paths):
        for s, v in zip(path.states, path.tokens, strict=True):
            p, q, advantage = book.p[s], book.q[s], book.r(s, v) + book.kl(s)
            c = (
                canonical_destination(p, q, v)
                if destination == "canonical"
                else geometric_destination(p, q, v, 0.3, 0.0, 1e300)
            )
            if advantage >= 0 or c is None:
                close(found[i, s], plain[i, s], 1e-12)
                continue
            c[v] -= 1.0
            change = strength * -advantage * p[v] * torch.tensor(c, dtype=torch.float64)
            close(moved(p, -found[i, s]), (1 - strength) * moved(p, -plain[i, s]) + change, 1e-12)
            suppressed += 1
    assert suppressed > 5


@each_world
def test_canonical_directions_add_up_to_the_natural_gradient(name: str) -> None:
    """Over one suppression of every token, each state moves by p A: the KL's steepest descent in the natural metric."""
    at, book = WORLDS[name], Book(WORLDS[name])
    for s, (p, q) in enumerate(zip(book.p, book.q, strict=True)):
        gains = [book.r(s, v) + book.kl(s) for v in range(book.vocab)]
        below = torch.tensor([v for v, gain in enumerate(gains) if gain < 0])
        rows = [torch.tensor(law, dtype=torch.float64).log().repeat(len(below), 1) for law in (p, q)]
        steps = single_tokens(*rows, below, natural())
        close(
            sum(moved(p, up) for up in steps), torch.tensor([x * g for x, g in zip(p, gains, strict=True)], dtype=torch.float64)
        )
    assert at.moments_of(natural()).mean.sub(at.moments_of(routed(Vanilla())).mean).abs().max() > 1e-3
    assert any("adds a pull" in b for b in natural().declared_target.biases)


def test_golden_case_leaks_in_logit_space_and_not_in_probability_space() -> None:
    """Token 1, which the teacher rejects too, still takes 70 % of the gain of a plain route, and nothing of a natural one."""
    axes = {"baseline": NoBaseline(), "allow_degenerate": True}
    gains = {}
    for space in ("logit", "probability"):
        up, _ = golden_step(routed(CounterfactualRoute("geometric", 1.0, alpha=1.0, space=space), **axes))
        change = moved(P, torch.tensor(up, dtype=torch.float64))
        gains[space] = float(change[1] / change[1:].clamp(min=0).sum())
    assert gains["logit"] == pytest.approx(0.698, abs=1e-3)
    assert abs(gains["probability"]) < 1e-12


def test_natural_steps_never_raise_the_divergence_and_close_where_they_would_be_steep() -> None:
    generator = torch.Generator().manual_seed(2)
    z, w = 1.5 * torch.randn(2, 10_000, 6, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
    p, q = z.softmax(-1), w.softmax(-1)
    gain = (q / p).log() + (p * (p / q).log()).sum(-1, keepdim=True)
    negative = gain.gather(-1, drawn[:, None]).squeeze(-1) < -1e-6
    assert (slope_of_kl(z, w, single_tokens(z, w, drawn, natural()))[negative] < 0).all()
    bounded, plain = (single_tokens(z, w, drawn, o) for o in (natural(max_ratio=3.0), routed(Vanilla())))
    reached = (gain > 0) & (q <= 3.0 * p)
    steepest = (gain * reached / (p * gain * reached).sum(-1, keepdim=True)).amax(-1)
    shut = negative & ~(steepest <= 3.0)  # nan where nothing can be reached
    assert 100 < shut.sum() < negative.sum()
    close(bounded[shut], plain[shut], 1e-12)
    assert ((bounded - plain)[negative & ~shut].abs().amax(-1) > 1e-9).all()


# ---- look-ahead ----------------------------------------------------------------------------------------------------------


def exact_future(at: TabularWorld) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) the exact critic W(s), and (S, V) the cost behind every token, both from sums over prefixes."""
    book = Book(at)
    cost = torch.tensor(book.values(book.kl, 1.0), dtype=torch.float64)
    own = torch.tensor([book.kl(s) for s in range(len(book.p))], dtype=torch.float64)
    behind = [[book.value(book.kl, 1.0, (*prefix, v)) for v in range(at.vocab)] for prefix in at.states]
    return own - cost, torch.tensor(behind, dtype=torch.float64)


def lookahead(strength: float, balanced: bool = True, credit: object = GAE(1.0, 0.0)) -> Objective:
    baseline = NoBaseline() if isinstance(credit, GAE) else ClosedFormBaseline()
    return routed(CounterfactualRoute("lookahead", strength, balanced), baseline, credit)


@each_world
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_balanced_look_ahead_is_the_gradient_of_completions(name: str, strength: float) -> None:
    """GAE(1, 0) with an exact critic has the advantage Q - V. At w = 1 its negative events alone are the exact gradient."""
    at = WORLDS[name]
    critic, ahead = exact_future(at)
    close(at.behind(torch.tensor(Book(at).values(Book(at).kl, 1.0), dtype=torch.float64)), ahead)
    found = at.moments_of(lookahead(strength), critic=critic, ahead=ahead).mean
    exact = Book(at).gradient_of_sum(reverse_kl, 1.0)
    close(found, exact)
    assert bool(lookahead(strength).declared_target.biases[1:]) == (strength > 0)  # the first is the critic's
    blind = routed(CounterfactualRoute("canonical", strength, True), NoBaseline(), GAE(1.0, 0.0))
    shift = (at.moments_of(blind, critic=critic).mean - exact).abs().max()
    assert shift > 1e-3 if strength else shift < 1e-10  # a destination that does not look ahead is not balanced


@each_world
def test_look_ahead_destinations_by_definition(name: str) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    critic, ahead = exact_future(at)
    expected, positive = torch.zeros(len(at.paths), *at.teacher.shape, dtype=torch.float64), 0
    for i, path in enumerate(at.paths):
        for s, v in zip(path.states, path.tokens, strict=True):
            q = [book.r(s, u) - float(ahead[s, u]) for u in range(book.vocab)]
            gains = [x - sum(p * y for p, y in zip(book.p[s], q, strict=True)) for x in q]
            size = [p * max(g, 0.0) for p, g in zip(book.p[s], gains, strict=True)]
            up = ascent(book.p[s], [x / sum(size) for x in size], gains[v], v, 1.0, True)
            positive += gains[v] > 0
            expected[i, s] -= torch.tensor(up, dtype=torch.float64)
    found = at.gradients_of(lookahead(1.0), critic=critic, ahead=ahead)
    close(found, expected, 1e-11)
    assert positive > 5


def test_look_ahead_under_sampled_returns_is_biased_and_says_so() -> None:
    """The mean of |A| where A < 0 is not |mean of A| there."""
    at = WORLDS["eos"]
    _, ahead = exact_future(at)
    objective = lookahead(1.0, credit=ReturnToGo())
    shift = at.moments_of(objective, ahead=ahead).mean - Book(at).gradient_of_sum(reverse_kl, 1.0)
    assert shift.abs().max() > 1e-3
    assert any("exact ones" in bias for bias in objective.declared_target.biases)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Extras\.ahead"):
        WORLDS["eos"].gradients_of(lookahead(1.0))
    with pytest.raises(DegenerateObjective, match="canonical"):
        refuse_unfit_source(lookahead(1.0), student_writes=True, others_write=False, steps_per_refresh=1)
    for route in (CounterfactualRoute("lookahead"), CounterfactualRoute("canonical", space="probability")):
        with pytest.raises(DegenerateObjective, match="a tail entry stands for many"):
            coarse(route)
    with pytest.raises(ValueError, match="at least 0"):
        SampledToken(-1)
