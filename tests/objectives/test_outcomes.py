"""Grades: what they add, by enumeration of every completion; the signs that they keep, over thousands of draws."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.objectives import (
    Additive,
    Bounded,
    ClosedFormBaseline,
    Constant,
    CounterfactualRoute,
    DegenerateObjective,
    Discounted,
    ForwardKL,
    FullVocab,
    GroupMean,
    Immediate,
    MagnitudeOnly,
    NoOutcome,
    Objective,
    OutcomeFilter,
    PPOClip,
    PrefixProduct,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Term,
    Terms,
    TokenMean,
    TopK,
    WrittenToken,
)
from opd_lightning.objectives.validate import refuse_unfit_source
from opd_lightning.types import Rollout
from tests.objectives.groups import gradients, mean
from tests.objectives.textbook import Book, close, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def objective(outcome: object, support: object = SampledToken(), credit: object = Immediate(), **axes: object) -> Objective:
    return Objective(ReverseKL(), support, credit, reduction=Constant(1.0), outcome=outcome, **axes)


def gradient_of_expected_grade(world: TabularWorld) -> torch.Tensor:
    law = world.student.log_softmax(-1)
    chances = [sum(law[s, v] for s, v in zip(path.states, path.tokens, strict=True)).exp() for path in world.paths]
    expected = sum(chance * world.grade(path) for chance, path in zip(chances, world.paths, strict=True))
    return torch.autograd.grad(expected, world.student)[0]


@each_world
@pytest.mark.parametrize("support", [SampledToken(), FullVocab(), TopK(2, closure="tail")], ids=repr)
@pytest.mark.parametrize("credit", [Immediate(), ReturnToGo(), Discounted(0.6)], ids=repr)
def test_added_grades_descend_the_sum_of_divergence_and_expected_grade(name: str, support: object, credit: object) -> None:
    world = WORLDS[name]
    found = world.moments_of(objective(Additive(0.7, grouped=False), support, credit)).mean
    plain = objective(NoOutcome(), support, credit)
    graded = gradient_of_expected_grade(world)
    assert graded.abs().max() > 0.01
    close(found, world.declared_gradient(plain) - 0.7 * graded)


@each_world
def test_the_other_rollouts_of_a_prompt_as_a_baseline_add_no_bias(name: str) -> None:
    world = WORLDS[name]
    pairs = list(product(world.paths, repeat=2))
    found = gradients(world, pairs, objective(Additive(0.7)))
    close(mean(pairs, found), world.moments_of(objective(Additive(0.7, grouped=False))).mean)
    both = Terms([Term(objective(Additive(0.7))), Term(objective(NoOutcome(), FullVocab()), weight=0.5)])
    expected = mean(pairs, found) + 0.5 * world.moments_of(objective(NoOutcome(), FullVocab())).mean
    close(mean(pairs, gradients(world, pairs, both)), expected)


@each_world
@pytest.mark.parametrize("credit", [Immediate(), Discounted(0.9)], ids=repr)
def test_bounded_mixing_by_definition(name: str, credit: object) -> None:
    world, book = WORLDS[name], Book(WORLDS[name])

    def advantages(path: object) -> list[float]:
        rewards = book.rewards(path)
        plain = [sum(credit.gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
        size = sum(map(abs, plain)) / len(plain)
        return [a / (size + abs(a)) + (1.0 if path.tokens[-1] == 0 else -1.0) for a in plain]

    assert all(a > 0.0 if world.grade(path) else a < 0.0 for path in world.paths for a in advantages(path))
    close(world.gradients_of(objective(Bounded(), credit=credit)), book.scores(advantages))


@each_world
def test_shaped_magnitudes_by_definition(name: str) -> None:
    """Over all pairs: the ratio of the two models, clipped and mixed in, times what the pair's grades say."""
    world, book = WORLDS[name], Book(WORLDS[name])
    pairs = list(product(world.paths, repeat=2))[:: 1 if name == "eos" else 5]
    found = gradients(world, pairs, objective(MagnitudeOnly(0.5, 0.1, 0.2, until=0.5)), progress=0.25)
    scored = dict(zip(world.paths, book.scores(lambda path: [1.0] * len(path.tokens)), strict=True))
    for (a, b), (of_a, _) in zip(pairs, found, strict=True):
        task = world.grade(a) - world.grade(b)
        expected = torch.zeros_like(of_a)
        for s, r in zip(a.states, book.rewards(a), strict=True):
            factor = min(max(math.exp(math.copysign(1.0, task) * r), 0.8), 1.2)
            expected[s] = task * (0.7 + 0.3 * factor) * scored[a][s]  # a state is visited once: its row is one token's
        close(of_a, expected)


GRADES = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**31), st.just(0.0) | st.floats(1e-9, 6.0), GRADES, st.floats(0.0, 1.0), st.floats(0.01, 0.99))
def test_signs_follow_the_grade(seed: int, size: float, grades: list[float], mix: float, bound: float) -> None:
    """20 tokens a draw: bounded mixing has the sign of the verdict, shaped magnitudes never flip and stay in their band."""
    generator = torch.Generator().manual_seed(seed)
    advantage = size * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    counts = torch.arange(5) < torch.randint(1, 6, (4, 1), generator=generator)
    outcome, group = torch.tensor(grades, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    given_to = (advantage, counts, outcome, group, 0.0)
    bounded = Bounded().combine(*given_to)[counts]
    assert torch.equal(bounded > 0, (outcome >= 0.5)[:, None].expand_as(counts)[counts])
    assert bounded.abs().max() < 2.0
    task = (outcome - outcome[[1, 0, 3, 2]])[:, None].expand_as(advantage)
    shaped = MagnitudeOnly(mix, bound=bound).combine(*given_to)
    assert torch.equal(shaped.sign(), task.sign())
    moved = (shaped / task)[task.abs() > 1e-9]
    assert bool(((moved >= 1 - mix * bound - 1e-9) & (moved <= 1 + mix * bound + 1e-9)).all())


def test_the_plain_advantage_does_flip() -> None:
    """The check above can fail: added grades leave tokens of right completions with a negative advantage."""
    world = WORLDS["fixed"]
    rewards = [r for path in world.paths if world.grade(path) for r in Book(world).rewards(path)]
    assert min(rewards) + 1.0 < 0.0


@pytest.mark.parametrize("outcome", [Bounded(), MagnitudeOnly()], ids=repr)
def test_where_the_models_agree_the_grade_is_left(outcome: object) -> None:
    world = WORLDS["fixed"]
    same = TabularWorld(world.student, world.student.detach(), world.horizon)
    pairs = list(product(same.paths, repeat=2))[::7]
    grades = gradients(same, pairs, objective(Additive(1.0)))
    found = gradients(same, pairs, objective(outcome))
    if isinstance(outcome, MagnitudeOnly):
        close(found, grades)
        return
    signs = torch.tensor([[2 * same.grade(path) - 1 for path in pair] for pair in pairs], dtype=torch.float64)
    ones = gradients(same, pairs, objective(Additive(1.0, grouped=False)))
    right = signs[..., None, None] > 0
    close(found.where(right, 0.0), ones.where(right, 0.0))
    assert found.isfinite().all()


@pytest.mark.parametrize("keep", ["right", "wrong"])
@pytest.mark.parametrize("support", [FullVocab(), SampledToken()], ids=repr)
def test_a_filter_is_the_mean_over_what_it_keeps(keep: str, support: object) -> None:
    world = WORLDS["eos"]
    batch = Rollout.cat([world.rollout(path) for path in world.paths])
    kept = [path for path in world.paths if bool(world.grade(path)) == (keep == "right")]
    assert 0 < len(kept) < len(world.paths)
    filtered = Objective(ReverseKL(), support, reduction=TokenMean(), outcome=OutcomeFilter(keep))
    assert filtered.denominators(batch) == [float(sum(len(path.tokens) for path in kept))]

    def gradient(of: Objective, paths: list) -> torch.Tensor:
        states = torch.tensor([s for path in paths for s in path.states])
        rows = world.student.detach()[states].requires_grad_(True)
        rollout = Rollout.cat([world.rollout(path) for path in paths])
        rollout = Rollout(**{**rollout.__dict__, "scale": (1.0 / of.denominators(rollout)[0],)})
        loss = of(TableLaws(rows), TableLaws(world.teacher[states]), rollout).loss
        out = torch.zeros_like(world.teacher)
        return out.index_put_((states,), torch.autograd.grad(loss, rows)[0], accumulate=True)

    close(gradient(filtered, world.paths), gradient(Objective(ReverseKL(), support), kept))


def test_declared_names() -> None:
    assert objective(Additive(0.5)).declared_target.name == "token-level reverse KL - 0.5 x expected grade"
    assert objective(Bounded()).declared_target.name.startswith(
        "expected grade, magnitudes shaped by the token-level reverse KL"
    )
    assert "right completions alone" in objective(OutcomeFilter()).declared_target.parts
    assert all(objective(o).declared_target.biases for o in (Bounded(), MagnitudeOnly(), OutcomeFilter()))


REFUSED = [
    ((ForwardKL(), WrittenToken()), {"outcome": Additive()}, "WrittenToken learns from the text of others"),
    ((ReverseKL(), FullVocab()), {"outcome": Bounded()}, "signals of drawn tokens"),
    ((ReverseKL(), SampledToken(), ReturnToGo()), {"outcome": MagnitudeOnly()}, "no log-ratios"),
    ((ReverseKL(), SampledToken(), Immediate(), GroupMean()), {"outcome": MagnitudeOnly()}, "no log-ratios"),
    ((ReverseKL(), TopK(2, closure="sampled_tail")), {"outcome": Bounded()}, "or more than that"),
    (
        (ReverseKL(), SampledToken(), Immediate(), ClosedFormBaseline()),
        {"outcome": Additive(), "route": CounterfactualRoute()},
        "for another reason",
    ),
    ((ReverseKL(), SampledToken(), ReturnToGo()), {"outcome": Additive(), "correction": PrefixProduct()}, "what follows it"),
]


@pytest.mark.parametrize(("parts", "axes", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_makes_no_sense_is_refused(parts: tuple, axes: dict, words: str) -> None:
    with pytest.raises(DegenerateObjective, match=words):
        Objective(*parts, **axes)


def test_grades_belong_to_the_students_own_fresh_text() -> None:
    plain, clipped = objective(Additive()), objective(Additive(), correction=PPOClip())
    with pytest.raises(DegenerateObjective, match="did not write"):
        refuse_unfit_source(plain, student_writes=True, others_write=True, steps_per_refresh=1)
    with pytest.raises(DegenerateObjective, match="name a correction"):
        refuse_unfit_source(plain, student_writes=True, others_write=False, steps_per_refresh=2)
    refuse_unfit_source(clipped, student_writes=True, others_write=False, steps_per_refresh=2)
    refuse_unfit_source(objective(OutcomeFilter(), FullVocab()), student_writes=False, others_write=True, steps_per_refresh=2)


def test_missing_grades_and_arguments_are_named() -> None:
    world = WORLDS["eos"]
    path = world.paths[0]
    rollout = Rollout(**{**world.rollout(path).__dict__, "outcome": None})
    laws = TableLaws(world.student[list(path.states)]), TableLaws(world.teacher[list(path.states)])
    for outcome in (Additive(), OutcomeFilter()):
        with pytest.raises(ValueError, match=r"Rollout\.outcome"):
            objective(outcome)(*laws, rollout)
    for wrong in (
        lambda: Additive(0.0),
        lambda: MagnitudeOnly(1.5),
        lambda: MagnitudeOnly(bound=1.0),
    ):
        with pytest.raises(ValueError, match=r"must|allowed|lie in"):
            wrong()
