"""The objectives against exact enumeration, and the golden numbers of a small world.

Where each statement about estimators is shown (a file once, its tests behind it):

- here: immediate credit is the token level, return-to-go the sequence level, and they differ:
  `test_every_accepted_combination_follows_what_it_declares`, `test_targets_are_the_gradients_of_the_named_scalars`; equal in
  value: `test_sequence_and_token_level_agree_in_value`; teacher text is forward KL, foreign tokens are reweighted.
- test_credits.py: total return, Rao-Blackwell, `test_the_divergence_of_the_own_state_is_no_signal`, gamma^t against gamma^k
  (`test_decayed_positions_times_discounted_credit_are_the_gradient_of_the_discounted_sum`), the couplings of a discount, the
  Jacobian's asymmetry, any function of the state as a baseline and none of the action, 1 / length with early ends.
- test_baselines.py: means over other rollouts and over earlier steps. test_gae.py: limits, bias, critic.
- test_corrections.py: token ratio, prefix product, truncation and its bound. test_gates.py: gates of the state and of the
  action, shapers. test_recorded_supports.py: entries chosen when the text was written.
- test_routes.py: direction, limits, canonical theorem, bias, balance, variance, descent of each of 10 000 draws, the golden
  case. test_routes_further.py: the same with a tail, natural routing, look-ahead. test_methods.py: AOPD, EOPD.
- test_members.py: no NaN at any limit, masked tokens in between, empty masks, gradient to student and critic alone.
- test_objective.py: identical teacher, columns that nobody can draw, padding, alignment. test_refusals.py: what is refused is
  broken. test_bigram_pilot.py: the raw top-k. test_fused.py: chunks, float32 and bfloat16.
- test_outcomes.py: grades added, bounded mixing and its sign rule, shaped magnitudes that never flip, filters.
- tests/ops/test_estimators.py: k1, k2, k3 and abs, backpropagated and as advantages. tests/contracts: gradients of every
  divergence by its definition, limits of families, closures at k = V, a token's value is no advantage.
- tests/strategies/test_splits.py: micro-batches and ranks. tests/inspect/test_audit.py: the mistakes of others, named.
"""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch

from opd_lightning import objectives
from opd_lightning.inspect.oracle import Path, TabularWorld, forward_kl, reverse_kl
from opd_lightning.objectives import (
    ClosedFormBaseline,
    DegenerateObjective,
    Discounted,
    Divergence,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    Hellinger,
    Immediate,
    NoBaseline,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    TopK,
    WrittenToken,
)
from tests.objectives.members import BASELINES, CREDITS, DIVERGENCES, FEWER, FURTHER, REDUCTIONS, SUPPORTS, WORLDS


def accepted(world: str, divergence: object, support: object) -> tuple[int, float]:
    """Number of accepted combinations of one divergence and support, and their largest error."""
    count, worst = 0, 0.0
    writer = "teacher" if isinstance(support, WrittenToken) else "student"
    for credit, baseline, reduction in product(CREDITS, BASELINES, REDUCTIONS):
        try:
            objective = Objective(divergence, support, credit, baseline, reduction)
        except DegenerateObjective:
            continue
        assert objective.declared_target.defect is None
        found = WORLDS[world].moments_of(objective, writer).mean
        error = (found - WORLDS[world].declared_gradient(objective, writer)).abs().max().item()
        count, worst = count + 1, max(worst, error)
    return count, worst


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_every_accepted_combination_follows_what_it_declares(world: str, support: object) -> None:
    total = 0
    for divergence in DIVERGENCES:
        count, worst = accepted(world, divergence, support)
        total += count
        assert worst < 1e-10, (divergence, support, worst)
    refused_for_all = isinstance(support, TopK) and (
        support.closure == "raw" or (support.closure == "renormalize" and support.k == 1 and support.by != "union")
    )
    assert (total == 0) == refused_for_all


def test_all_divergences_of_the_package_are_here() -> None:
    concrete = {c for n in objectives.__all__ if _is_divergence(c := getattr(objectives, n))}
    assert {type(d) for d in DIVERGENCES + FURTHER} == concrete


def _is_divergence(c: object) -> bool:
    return isinstance(c, type) and issubclass(c, Divergence) and not inspect.isabstract(c)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("divergence", FURTHER, ids=repr)
def test_every_accepted_combination_of_the_further_divergences(world: str, divergence: Divergence) -> None:
    for support in FEWER if world == "eos" else FEWER[:3]:  # no top-k where all completions are equally long
        count, worst = accepted(world, divergence, support)
        assert worst < 1e-10, (support, worst)
        if isinstance(support, SampledToken):
            assert (count > 0) == (divergence.separable and not divergence.heavy_tailed)
        elif isinstance(support, TopK) and support.closure == "stop_gradient":
            assert (count > 0) == divergence.separable
        else:
            refused = isinstance(support, WrittenToken) or (
                isinstance(support, TopK) and (support.k == 1 or support.closure == "raw")
            )
            assert (count == 0) == refused


@pytest.mark.parametrize("support", [FullVocab(), SampledToken(), TopK(2, "teacher", "tail")], ids=repr)
def test_a_temperature_divides_both_laws(support: object) -> None:
    objective = Objective(Hellinger(), support, temperature=2.0)
    found, declared = WORLDS["eos"].moments_of(objective).mean, WORLDS["eos"].declared_gradient(objective)
    torch.testing.assert_close(found, declared, atol=1e-12, rtol=1e-9)
    assert (declared - WORLDS["eos"].declared_gradient(Objective(Hellinger(), support))).abs().max() > 1e-3


def test_what_is_held_fixed_is_declared() -> None:
    for divergence in DIVERGENCES + FURTHER:
        assert ("held fixed" in str(Objective(divergence).declared_target)) == divergence.frozen


@pytest.mark.parametrize(
    "objective",
    [
        Objective(ReverseKL(), SampledToken(), Discounted(0.4), ClosedFormBaseline()),
        Objective(GeneralizedJSD(0.3), TopK(2, "union", "tail"), ReturnToGo(), reduction=SequenceMean()),
    ],
    ids=repr,
)
def test_one_pass_over_all_completions_equals_one_by_one(objective: Objective) -> None:
    """`moments` is what users run on their own losses."""
    world = WORLDS["eos"]
    batched = world.moments_of(objective)
    single = world.moments(lambda rollout, student, teacher: objective(student, teacher, rollout).loss)
    torch.testing.assert_close(batched.mean, single.mean, atol=1e-14, rtol=1e-12)
    assert batched.trace == pytest.approx(single.trace, rel=1e-12)


# ---- the declared gradients themselves, from formulas written here -------------------------------------------------------


def test_targets_are_the_gradients_of_the_named_scalars() -> None:
    """gamma = 1 is the gradient of KL between completions, computed by summing over them; gamma = 0 holds visitation still."""
    world = WORLDS["eos"]
    student, teacher = world.laws()
    sequence = torch.zeros((), dtype=torch.float64)
    for path in world.paths:
        ours = sum(student[s, v] for s, v in zip(path.states, path.tokens, strict=True))
        theirs = sum(teacher[s, v] for s, v in zip(path.states, path.tokens, strict=True))
        sequence = sequence + ours.exp() * (ours - theirs)
    (exact,) = torch.autograd.grad(sequence, world.student)
    torch.testing.assert_close(world.gradient(reverse_kl, gamma=1.0), exact, atol=1e-12, rtol=1e-10)

    student, teacher = world.laws()
    reach = {path.tokens[:t]: 0.0 for path in world.paths for t in range(len(path.tokens))}
    for path in world.paths:
        for t in range(len(path.tokens)):
            reach[path.tokens[:t]] += path.student
    frozen = sum(reach[prefix] * (student[i].exp() * (student[i] - teacher[i])).sum() for i, prefix in enumerate(world.states))
    (exact,) = torch.autograd.grad(frozen, world.student)
    torch.testing.assert_close(world.gradient(reverse_kl, gamma=0.0), exact, atol=1e-12, rtol=1e-10)
    assert (world.gradient(reverse_kl, 1.0) - world.gradient(reverse_kl, 0.0)).abs().max() > 1e-3


def test_sequence_and_token_level_agree_in_value() -> None:
    world = WORLDS["eos"]
    difference = (world.laws()[0] - world.laws()[1]).detach()
    total = 0.0
    for path in world.paths:
        total += path.student * sum(float(difference[s, v]) for s, v in zip(path.states, path.tokens, strict=True))
    assert total == pytest.approx(float(world.value(reverse_kl)[0].detach()))
    assert total == pytest.approx(float((world.visitation() * reverse_kl(*world.laws())).sum().detach()))


def test_teacher_text_descends_the_forward_kl_of_completions() -> None:
    world = WORLDS["eos"]
    student, _ = world.laws()
    cross = -sum(path.teacher * student[s, v] for path in world.paths for s, v in zip(path.states, path.tokens, strict=True))
    (exact,) = torch.autograd.grad(cross, world.student)
    found = world.moments_of(Objective(ForwardKL(), WrittenToken()), writer="teacher").mean
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found, world.gradient(forward_kl, 0.0, writer="teacher"), atol=1e-12, rtol=1e-10)


def test_off_policy_tokens_are_reweighted_by_the_recorded_sampler() -> None:
    """Completions of another law, its log-probabilities recorded: the token ratio repairs the action, not the states."""
    world = WORLDS["eos"]
    found = world.moments_of(Objective(ReverseKL(), SampledToken()), writer="teacher").mean
    torch.testing.assert_close(found, world.gradient(reverse_kl, 0.0, writer="teacher"), atol=1e-12, rtol=1e-10)


# ---- MDP-G: golden numbers ------------------------------------------------------------------------------------------------


@pytest.fixture
def golden() -> TabularWorld:
    student = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    teacher = torch.tensor([[0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)
    return TabularWorld.from_probabilities(student, teacher, horizon=2)


def exactly(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=6e-8, rtol=0.0)


def test_golden_divergences(golden: TabularWorld) -> None:
    exactly(reverse_kl(*golden.laws()).detach(), 0.27488722, 0.27725887, 0.09458187, 0.19274476)
    assert float(golden.value(reverse_kl)[0].detach()) == pytest.approx(0.48044017, abs=6e-9)


@pytest.mark.parametrize(
    ("credit", "baseline", "root", "trace"),
    [
        (Immediate(), NoBaseline(), (-0.32070176, 0.08246617, 0.23823559), 0.37945143),
        (ReturnToGo(), NoBaseline(), (-0.35655472, 0.11575749, 0.24079723), 0.57333884),
        (Discounted(0.5), NoBaseline(), (-0.33862824, 0.09911183, 0.23951641), 0.42732331),
        (Immediate(), ClosedFormBaseline(), (-0.32070176, 0.08246617, 0.23823559), 0.49152630),
    ],
    ids=["immediate", "return-to-go", "discounted", "vOPD"],
)
def test_golden_estimators(golden: TabularWorld, credit: object, baseline: object, root: tuple, trace: float) -> None:
    found = golden.moments_of(Objective(ReverseKL(), SampledToken(), credit, baseline))
    exactly(-found.mean[0], *root)
    assert found.trace == pytest.approx(trace, abs=6e-9)
    if isinstance(credit, Immediate):
        exactly(-found.mean[1], -0.12476649, 0.04158883, 0.08317766)


def test_golden_gae_and_rao_blackwell(golden: TabularWorld) -> None:
    """Estimators that are not in the library yet, through the same oracle."""
    student, teacher = (law.detach() for law in golden.laws())
    kl, values = reverse_kl(student, teacher), -golden.value(reverse_kl).detach()

    def rewards(path: Path) -> list[float]:
        return [float(teacher[s, v] - student[s, v]) for s, v in zip(path.states, path.tokens, strict=True)]

    def gae(path: Path) -> list[float]:
        after = [float(values[s]) for s in path.states[1:]] + [0.0]
        return [r + n - float(values[s]) for r, n, s in zip(rewards(path), after, path.states, strict=True)]

    def rao_blackwell(path: Path) -> list[float]:
        later = [-float(kl[s]) for s in path.states[1:]] + [0.0]
        return [r + n for r, n in zip(rewards(path), later, strict=True)]

    for advantages, trace in ((gae, 0.50104304), (rao_blackwell, 0.39863181)):
        found = golden.moments_of_advantages(advantages)
        exactly(-found.mean[0], -0.35655472, 0.11575749, 0.24079723)
        assert found.trace == pytest.approx(trace, abs=6e-9)


def test_golden_router(golden: TabularWorld) -> None:
    """Advantages at the root, the suppressed mass and the canonical route."""
    p, q = (table.detach().softmax(-1)[0] for table in (golden.student, golden.teacher))
    advantage = q.log() - p.log() + (p * (p / q).log()).sum()
    torch.testing.assert_close(advantage, torch.tensor([-0.64140, 0.27489, 1.19118], dtype=torch.float64), atol=6e-6, rtol=0.0)
    mass = 0.5 * (p * advantage.abs()).sum()
    assert mass.item() == pytest.approx(0.32070, abs=6e-6)
    route = p * advantage.clamp(min=0) / mass
    torch.testing.assert_close(route, torch.tensor([0.0, 0.25714, 0.74286], dtype=torch.float64), atol=6e-6, rtol=0.0)
