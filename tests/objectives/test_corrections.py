"""Completions of another law: every correction by its definition, and what its expectation is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from opd_lightning.inspect.oracle import Path
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    Constant,
    Correction,
    DegenerateObjective,
    Discounted,
    FullVocab,
    GeneralizedJSD,
    ICEPop,
    Immediate,
    KStep,
    NoCorrection,
    Objective,
    PPOClip,
    PrefixProduct,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMask,
    TokenRatio,
    TopK,
    TotalReturn,
    TruncatedRatio,
    TrustRegionDrop,
)
from tests.objectives.textbook import Book, close, reverse_kl, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def sampled(correction: Correction, credit: object = Immediate(), **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(), credit, reduction=Constant(1.0), correction=correction, **axes)


def returns(rewards: list[float]) -> list[float]:
    return [sum(rewards[t:]) for t in range(len(rewards))]


def clipped(ratios: list[float], advantages: list[float]) -> list[float]:
    """d/d ratio of min(ratio A, clip(ratio) A) / A, by autograd, times the ratio (the gradient of log p)."""
    out = []
    for ratio, advantage in zip(ratios, advantages, strict=True):
        x = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        surrogate = torch.minimum(x * advantage, x.clamp(1 - 0.2, 1 + 0.3) * advantage)
        out.append(float(torch.autograd.grad(surrogate, x)[0]) / advantage * ratio)
    return out


def geometric_mean(ratios: list[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


Weights = Callable[[list[float], list[float]], list[float]]
DEFINITIONS: list[tuple[Correction, Weights]] = [
    (TokenRatio(), lambda u, a: u),
    (NoCorrection(), lambda u, a: [1.0] * len(u)),
    (PPOClip(0.2, 0.3), clipped),
    (TruncatedRatio(1.3, 0.8), lambda u, a: [min(max(x, 0.8), 1.3) for x in u]),
    (ICEPop(0.8, 1.3), lambda u, a: [x if 0.8 <= x <= 1.3 else 0.0 for x in u]),
    (SequenceMask(0.9, 1.2), lambda u, a: [x if 0.9 <= geometric_mean(u) <= 1.2 else 0.0 for x in u]),
    (TrustRegionDrop(0.3), lambda u, a: [x if abs(math.log(x)) <= 0.3 else 0.0 for x in u]),
]
MEMBERS = [*(c for c, _ in DEFINITIONS), PrefixProduct(), PrefixProduct(5.0)]


@each_world
@pytest.mark.parametrize("credit", [Immediate(), ReturnToGo()], ids=repr)
@pytest.mark.parametrize(("correction", "weights"), DEFINITIONS, ids=lambda x: getattr(x, "title", ""))
def test_weight_by_definition_on_every_foreign_completion(
    name: str, credit: object, correction: Correction, weights: Weights
) -> None:
    book, touched = Book(WORLDS[name]), []

    def advantages(path: Path) -> list[float]:
        plain = returns(book.rewards(path)) if credit.gamma else book.rewards(path)
        found = weights(book.ratios(path), plain)
        touched.extend(w != u for w, u in zip(found, book.ratios(path), strict=True))
        return [w * a for w, a in zip(found, plain, strict=True)]

    close(WORLDS[name].gradients_of(sampled(correction, credit), "sampler"), book.scores(advantages), 1e-11)
    assert any(touched) or isinstance(correction, TokenRatio)
    assert not all(touched) or isinstance(correction, NoCorrection)


def test_every_correction_of_the_package_is_here() -> None:
    assert set(map(type, MEMBERS)) == set(Correction.__subclasses__())


def test_what_a_correction_leaves_is_declared() -> None:
    """The token ratio is the default and exact on the states that were visited; the free product leaves nothing."""
    for correction in MEMBERS:
        biases = sampled(correction).declared_target.biases
        exact = correction.title in (TokenRatio.title, PrefixProduct().title)
        assert biases == (() if exact else (f"on stale rollouts {correction.bias}",))


@each_world
@pytest.mark.parametrize("correction", MEMBERS, ids=lambda c: c.title)
def test_on_the_students_own_completions_nothing_is_corrected(name: str, correction: Correction) -> None:
    at = WORLDS[name]
    for credit in (Immediate(), Discounted(0.5, analytic=True), ReturnToGo()):
        for baseline in ({}, {"baseline": ClosedFormBaseline()}):
            plain = at.gradients_of(sampled(NoCorrection(), credit, **baseline))
            close(at.gradients_of(sampled(correction, credit, **baseline)), plain, 1e-12)


# ---- expectations --------------------------------------------------------------------------------------------------------


@each_world
def test_token_ratio_is_exact_on_the_states_of_the_sampler(name: str) -> None:
    book, at = Book(WORLDS[name]), WORLDS[name]
    reach = [0.0] * len(book.p)
    for path in at.paths:
        for s in path.states:
            reach[s] += path.sampler
    law = at.student.softmax(-1)
    total = sum(reach[s] * reverse_kl(law[s], torch.tensor(book.q[s], dtype=torch.float64)) for s in range(len(book.p)))
    (exact,) = torch.autograd.grad(total, at.student)
    for baseline in ({}, {"baseline": ClosedFormBaseline()}):
        close(at.moments_of(sampled(TokenRatio(), **baseline), "sampler").mean, exact)
    close(at.declared_gradient(sampled(TokenRatio()), "sampler"), exact)
    assert (at.moments_of(sampled(NoCorrection()), "sampler").mean - exact).abs().max() > 1e-3
    assert (at.moments_of(sampled(TokenRatio(), ReturnToGo()), "sampler").mean - exact).abs().max() > 1e-3


EXACT = [
    (SampledToken(), Immediate()),
    (SampledToken(), ReturnToGo()),
    (SampledToken(), ReturnToGo(analytic=True)),
    (SampledToken(), Discounted(0.6)),
    (SampledToken(), KStep(2)),
    (TopK(1, closure="sampled_tail"), ReturnToGo()),
    (FullVocab(), ReturnToGo()),
    (FullVocab(), KStep(2, 0.8)),
]


@each_world
@pytest.mark.parametrize("divergence", [ReverseKL(), GeneralizedJSD(0.4)], ids=repr)
@pytest.mark.parametrize(("support", "credit"), EXACT, ids=lambda x: x.title)
def test_prefix_product_gives_the_gradient_of_the_student_itself(
    name: str, divergence: object, support: object, credit: object
) -> None:
    """Token-level, discounted and sequence-level alike, from completions of another law."""
    objective = Objective(divergence, support, credit, reduction=Constant(1.0), correction=PrefixProduct())
    at = WORLDS[name]
    close(at.moments_of(objective, "sampler").mean, at.moments_of(objective, "student").mean)
    if isinstance(divergence, ReverseKL) and isinstance(credit, ReturnToGo):
        close(at.moments_of(objective, "sampler").mean, Book(at).gradient_of_sum(reverse_kl, 1.0))


def test_the_ratios_up_to_a_token_alone_would_not_correct_what_follows_it() -> None:
    """Each later cost needs the ratios up to itself: weighting the whole return by the prefix of its first token is biased."""
    book, at = Book(WORLDS["eos"]), WORLDS["eos"]

    def advantages(path: Path) -> list[float]:
        ratios, to_go = book.ratios(path), returns(book.rewards(path))
        return [math.prod(ratios[: t + 1]) * to_go[t] for t in range(len(to_go))]

    naive, exact = book.mean(book.scores(advantages), "sampler"), book.gradient_of_sum(reverse_kl, 1.0)
    assert (naive - exact).abs().max() > 1e-2
    close(at.moments_of(sampled(PrefixProduct(), ReturnToGo()), "sampler").mean, exact)


def test_a_capped_product_by_definition() -> None:
    book, at = Book(WORLDS["eos"]), WORLDS["eos"]
    capped = [0]

    def advantages(path: Path) -> list[float]:
        products = [math.prod(book.ratios(path)[: t + 1]) for t in range(len(path.tokens))]
        capped[0] += sum(x > 1.1 for x in products)
        return returns([min(x, 1.1) * r for x, r in zip(products, book.rewards(path), strict=True)])

    close(at.gradients_of(sampled(PrefixProduct(1.1), ReturnToGo()), "sampler"), book.scores(advantages), 1e-12)
    assert capped[0] > 3
    close(
        at.gradients_of(sampled(PrefixProduct(1e9), ReturnToGo()), "sampler"),
        at.gradients_of(sampled(PrefixProduct(), ReturnToGo()), "sampler"),
        1e-12,
    )


@pytest.mark.parametrize("credit", [TotalReturn(), GAE(1.0, 1.0)], ids=repr)
def test_prefix_product_is_refused_where_a_token_gets_what_stands_before_it(credit: object) -> None:
    """And would be biased, though both credits are exact on the student's own completions."""
    with pytest.raises(DegenerateObjective, match="ReturnToGo"):
        sampled(PrefixProduct(), credit)
    at, forced = WORLDS["eos"], sampled(PrefixProduct(), credit, allow_degenerate=True)
    exact = Book(at).gradient_of_sum(reverse_kl, 1.0)
    close(at.moments_of(forced, "student").mean, exact)
    assert (at.moments_of(forced, "sampler").mean - exact).abs().max() > 1e-2


def test_an_endless_product_stays_finite() -> None:
    log_ratio = torch.full((1, 4000), 0.5)
    for direction in (1.0, -1.0):
        reach = PrefixProduct().reach(direction * log_ratio, torch.ones(1, 4000, dtype=torch.bool))
        assert reach is not None
        assert torch.isfinite(reach.token).all() and torch.isfinite(reach.state).all()


def test_a_correction_without_sampled_tokens_is_refused_and_would_be_idle() -> None:
    at = WORLDS["eos"]
    plain = at.gradients_of(Objective(ReverseKL(), FullVocab(), reduction=Constant(1.0)), "sampler")
    for correction in MEMBERS[1:]:
        with pytest.raises(DegenerateObjective, match="TokenRatio"):
            Objective(ReverseKL(), FullVocab(), correction=correction)
        forced = Objective(ReverseKL(), reduction=Constant(1.0), correction=correction, allow_degenerate=True)
        close(at.gradients_of(forced, "sampler"), plain, 0.0)


@each_world
def test_the_bias_of_truncated_ratios_is_bounded_by_what_is_cut(name: str) -> None:
    """norm <= E_old sum_t (ratio - cap)_+ abs(A) norm(grad log p), so it falls to nothing as the cap rises."""
    at, book = WORLDS[name], Book(WORLDS[name])
    exact, norms = at.moments_of(sampled(TokenRatio()), "sampler").mean, []
    for cap in (1.0, 1.2, 2.0, 1e9):
        norms.append(float((at.moments_of(sampled(TruncatedRatio(cap)), "sampler").mean - exact).norm()))
        bound = 0.0
        for path in at.paths:
            for s, v, u in zip(path.states, path.tokens, book.ratios(path), strict=True):
                score = [(w == v) - p for w, p in enumerate(book.p[s])]
                bound += path.sampler * max(u - cap, 0.0) * abs(book.r(s, v)) * math.hypot(*score)
        assert norms[-1] <= bound + 1e-12
    assert norms[0] > 1e-3 and norms[-1] < 1e-12
