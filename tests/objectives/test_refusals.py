"""What is refused has the defect that the refusal names, or is not defined."""

from __future__ import annotations

import itertools

import pytest
import torch

from opd_lightning.inspect.oracle import TabularWorld
from opd_lightning.inspect.textbook import state_divergence
from opd_lightning.objectives import (
    ClosedFormBaseline,
    DegenerateObjective,
    Divergence,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    Immediate,
    NoBaseline,
    Objective,
    PearsonChi2,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    TopK,
    WrittenToken,
)
from tests.objectives.members import CREDITS, DIVERGENCES, FURTHER, WORLDS


def forced(*arguments: object, **keys: object) -> Objective:
    objective = Objective(*arguments, allow_degenerate=True, **keys)
    assert objective.declared_target.name == "none"
    with pytest.raises(DegenerateObjective):
        Objective(*arguments, **keys)
    return objective


@pytest.mark.parametrize("by", ["student", "teacher", "intersection"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_one_renormalised_entry_has_no_gradient(divergence: object, by: str) -> None:
    found = WORLDS["eos"].moments_of(forced(divergence, TopK(1, by, "renormalize")))
    assert found.mean.abs().max() < 1e-14
    assert found.trace < 1e-14


@pytest.mark.parametrize("by", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES + FURTHER if d.separable and d.slope], ids=repr)
def test_raw_top_k_moves_where_the_two_agree(divergence: Divergence, by: str) -> None:
    table = WORLDS["fixed"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=2)
    found = agreed.moments_of(forced(divergence, TopK(2, by, "raw"))).mean
    law = table.softmax(-1)
    inside = torch.zeros_like(law).scatter(-1, law.topk(2).indices, 1.0)
    mass = (law * inside).sum(-1, keepdim=True)
    drained = agreed.visitation().detach()[:, None] * law * (inside - mass)  # gradient of the student's own mass on S
    slope = divergence.slope  # descent: a negative one (reverse KL) drains S, a positive one (forward KL) fills it
    if divergence.frozen:  # a mixture that does not give way resists in full
        slope = slope / (1.0 - divergence.alpha)
    torch.testing.assert_close(found, -slope * drained, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES + FURTHER if d.separable and not d.slope], ids=repr)
def test_without_a_slope_raw_is_the_stop_gradient_closure(divergence: Divergence) -> None:
    raw = WORLDS["eos"].moments_of(forced(divergence, TopK(2, "teacher", "raw"))).mean
    named = WORLDS["eos"].moments_of(Objective(divergence, TopK(2, "teacher", "stop_gradient"))).mean
    torch.testing.assert_close(raw, named, atol=1e-14, rtol=0.0)


@pytest.mark.parametrize("support", [TopK(2, closure="stop_gradient"), TopK(2, closure="raw"), SampledToken()], ids=repr)
@pytest.mark.parametrize("divergence", [d for d in FURTHER if not d.separable], ids=repr)
def test_what_couples_all_entries_is_undefined_on_some(divergence: Divergence, support: object) -> None:
    with pytest.raises(TypeError, match="on whole laws"):
        WORLDS["eos"].moments_of(forced(divergence, support))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES + FURTHER if d.separable], ids=repr)
def test_sampled_heavy_tails_have_no_bounded_variance(divergence: Divergence) -> None:
    """Unbiased, but the trace grows without end where the student hardly samples what the teacher wants."""
    traces = []
    for p in (1e-2, 1e-4, 1e-6):
        world = TabularWorld.from_probabilities(torch.tensor([[1 - p, p]]), torch.tensor([[0.5, 0.5]]), horizon=1)
        make = forced if divergence.heavy_tailed else Objective
        objective = make(divergence, SampledToken())
        found = world.moments_of(objective)
        torch.testing.assert_close(found.mean, world.gradient(state_divergence(objective), 0.0), atol=1e-8, rtol=1e-6)
        traces.append(found.trace)
    growth = [after / before for before, after in itertools.pairwise(traces)]
    if divergence.heavy_tailed:
        assert min(growth) > (90 if isinstance(divergence, (ForwardKL, PearsonChi2)) else 2)
    else:
        assert growth[-1] < 1.2
        assert traces[-1] < 1.0


LIGHT = [d for d in DIVERGENCES + FURTHER if d.separable and not d.heavy_tailed]


@pytest.mark.parametrize("divergence", LIGHT, ids=repr)
def test_what_earlier_tokens_answer_for_is_no_importance_weight_either(divergence: Divergence) -> None:
    """The sampled cost of an accepted divergence has a bounded second moment."""
    for p in (1e-2, 1e-4, 1e-6):
        s, t = torch.tensor([[1 - p, p], [0.5, 0.5]], dtype=torch.float64).log()
        assert (s.exp() * divergence.value(s, t).square()).sum() < 6.0


@pytest.mark.parametrize("support", [FullVocab(), TopK(2, "student", "tail")], ids=repr)
@pytest.mark.parametrize("credit", CREDITS, ids=repr)
def test_a_baseline_without_sampling_noise_does_nothing(support: object, credit: object) -> None:
    plain = WORLDS["eos"].moments_of(Objective(ReverseKL(), support, credit))
    inert = forced(ReverseKL(), support, credit, ClosedFormBaseline())
    found = WORLDS["eos"].moments_of(inert)
    torch.testing.assert_close(found.mean, plain.mean, atol=1e-15, rtol=0.0)
    assert found.trace == pytest.approx(plain.trace)
    assert inert.declared_target.remedy == "baseline: NoBaseline"


def test_a_baseline_under_the_sequence_mean_shifts_the_gradient() -> None:
    with_baseline = forced(ReverseKL(), SampledToken(), Immediate(), ClosedFormBaseline(), SequenceMean())
    without = Objective(ReverseKL(), SampledToken(), Immediate(), NoBaseline(), SequenceMean())
    shift = (WORLDS["eos"].moments_of(with_baseline).mean - WORLDS["eos"].moments_of(without).mean).abs().max()
    assert shift > 1e-2
    fixed = (WORLDS["fixed"].moments_of(with_baseline).mean - WORLDS["fixed"].moments_of(without).mean).abs().max()
    assert fixed < 1e-12  # where all completions are equally long it is neutral


def test_the_students_own_text_as_target_teaches_nothing() -> None:
    found = WORLDS["eos"].moments_of(Objective(ForwardKL(), WrittenToken()), writer="student").mean
    assert found.abs().max() < 1e-14


@pytest.mark.parametrize(
    "arguments",
    [(ReverseKL(), WrittenToken()), (GeneralizedJSD(), WrittenToken()), (ForwardKL(), WrittenToken(), ReturnToGo())],
    ids=repr,
)
def test_a_written_token_has_one_divergence_and_no_future(arguments: tuple) -> None:
    objective = forced(*arguments)
    plain = Objective(ForwardKL(), WrittenToken())
    if objective.credit.gamma == 0.0:  # whatever name is written beside it, the gradient is the likelihood's
        found = WORLDS["eos"].moments_of(objective, writer="teacher").mean
        torch.testing.assert_close(found, WORLDS["eos"].moments_of(plain, writer="teacher").mean)
    else:
        with pytest.raises(KeyError):  # there is no cost to hand back
            WORLDS["eos"].moments_of(objective, writer="teacher")
