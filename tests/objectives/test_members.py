"""Every member of every axis: what is accepted follows what it declares, and nothing is ever NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from inspect import isabstract
from itertools import product
from random import Random

import pytest
import torch

from opd_lightning import objectives as package
from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.objectives import (
    GAE,
    AdaptiveKL,
    Clip,
    Constant,
    DegenerateObjective,
    Extras,
    GeneralizedJSD,
    KStep,
    Objective,
    ReturnToGo,
    SequenceMean,
    TeacherTemperature,
    TopK,
    UniformLaw,
)
from opd_lightning.objectives.validate import refuse_unfit_source
from opd_lightning.types import Completion, Prompt, Rollout
from tests.objectives.textbook import world

AXES = (
    "Divergence",
    "Support",
    "Credit",
    "Baseline",
    "Reduction",
    "Target",
    "Gate",
    "Shaper",
    "Route",
    "Correction",
    "Outcome",
)
ARGUMENTS: dict[str, list[dict]] = {
    "Additive": [{}, {"grouped": False}],
    "Amari": [{"alpha": 0.5}, {"alpha": -0.5}],
    "Renyi": [{"alpha": 0.5}],
    "SkewForwardKL": [{"alpha": 0.1}],
    "SkewReverseKL": [{"alpha": 0.1}, {"alpha": 0.1, "detach_mixture": True}],
    "Clip": [{"bound": 1.0}],
    "Constant": [{"length": 2.0}],
    "CounterfactualRoute": [
        {"destination": d, "strength": w, "balanced": b}
        for d, w, b in (
            ("canonical", 0.5, True),
            ("canonical", 1.0, False),
            ("geometric", 0.5, False),
            ("geometric", 1.0, True),
        )
    ]
    + [{"destination": d, "strength": 0.5, "space": "probability"} for d in ("canonical", "geometric")]
    + [{"destination": "lookahead", "strength": 0.5, "balanced": b} for b in (False, True)],
    "Discounted": [{"gamma": 0.5}, {"gamma": 0.5, "analytic": True}],
    "Disagreement": [{"at_least": 0.3}, {"top_fraction": 0.5}],
    "FirstTokens": [{"count": 2}],
    "GAE": [{}, {"gamma": 0.0}, {"gamma": 1.0, "lam": 1.0}, {"train_critic": False}],
    "KStep": [{"k": 1}, {"k": 2}],
    "OutcomeFilter": [{"keep": "right"}, {"keep": "wrong"}],
    "SampledToken": [{}, {"k": 1}],
    "PositionDecay": [{"gamma": 0.5}],
    "PrefixProduct": [{}, {"cap": 3.0}],
    "ReturnToGo": [{}, {"analytic": True}],
    "Skewed": [{"student_share": 0.3}],
    "GeometricBridge": [{"student_share": 0.3}],
    "SkipFirst": [{"count": 1}],
    "SpecialTokens": [{"ids": [1]}, {"ids": [1], "first_only": False}],
    "StudentEntropy": [{"at_least": 0.5}, {"top_fraction": 0.5}],
    "TeacherEntropy": [{"at_most": 0.8}],
    "TeacherTemperature": [{"temperature": 0.5}],
    "TokenGap": [{"at_most": 0.0}, {"top_fraction": 0.5}],
    "TopK": [
        {"k": k, "by": by, "closure": closure}
        for k, by, closure in (
            *((2, by, c) for by in ("union", "intersection") for c in ("tail", "renormalize", "stop_gradient")),
            *((k, by, "sampled_tail") for k in (1, 3) for by in ("student", "union", "intersection")),
            *((1, by, "renormalize_teacher") for by in ("teacher", "intersection")),
        )
    ]
    + [{"k": 2, "by": by, "closure": c, "ids": "sampling"} for by, c in (("student", "tail"), ("union", "stop_gradient"))],
}


def members(axis: str) -> list:
    base = getattr(package, axis)
    found = [c for name in package.__all__ if isinstance(c := getattr(package, name), type) and issubclass(c, base)]
    concrete = [cls for cls in found if not isabstract(cls)]
    return [cls(**arguments) for cls in concrete for arguments in ARGUMENTS.get(cls.__name__, [{}])]


MEMBERS = {axis: members(axis) for axis in AXES}


def test_every_member_is_exported() -> None:
    def leaves(cls: type) -> set[type]:
        below = cls.__subclasses__()
        named = not isabstract(cls) and not cls.__name__.startswith("_")
        own = {cls} if named and cls.__module__.startswith("opd_lightning.objectives") else set()
        return own.union(*map(leaves, below))

    for axis in AXES:
        base = getattr(package, axis)
        assert {type(member) for member in MEMBERS[axis]} == leaves(base) - {base}, axis


# ---- accepted combinations -----------------------------------------------------------------------------------------------

WORLDS = {"fixed": world(4, 2, seed=2), "eos": world(3, 3, seed=3, eos=2)}
KEYS = tuple("gates" if axis == "Gate" else axis.lower() for axis in AXES)


def accepted(count: int, seed: int) -> list[Objective]:
    """Random picks of every axis that the validator lets pass; the last six axes mostly stay at their default."""
    random, found = Random(seed), []
    while len(found) < count:
        picks = {key: random.choice(MEMBERS[axis]) for key, axis in zip(KEYS, AXES, strict=True)}
        for key in ("target", "gates", "shaper", "route", "correction", "outcome", "baseline"):
            if random.random() < 0.6:
                del picks[key]
        if "gates" in picks:
            picks["gates"] = [picks["gates"], *random.sample(MEMBERS["Gate"], random.choice((0, 1)))]
        if isinstance(picks["divergence"], AdaptiveKL) and isinstance(picks.get("target"), UniformLaw):
            continue  # which equal entries make the head is anybody's choice
        try:
            found.append(Objective(**picks))
        except DegenerateObjective as refusal:
            assert "Write instead" in str(refusal)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_every_accepted_combination_follows_its_declared_gradient(seed: int) -> None:
    """150 random combinations; those that declare a direction without a closed form must say how they are biased."""
    compared = 0
    for objective in accepted(150, seed):
        declared = objective.declared_target
        assert declared.defect is None and declared.remedy is None and declared.name != "none"
        at = WORLDS["eos" if seed % 2 else "fixed"]
        critic = torch.linspace(-1.0, 0.5, len(at.states), dtype=torch.float64)
        given = {"reference": at.sampler, "critic": critic, "progress": 0.3}
        ahead = torch.linspace(0.0, 1.0, at.teacher.numel(), dtype=torch.float64).view_as(at.teacher)
        writer = "student" if objective.support.needs_teacher else "teacher"
        try:
            exact = at.declared_gradient(objective, writer, **given)
        except ValueError as reason:
            assert "no closed form" in str(reason)
            assert declared.biases
            continue
        error = (at.moments_of(objective, writer, ahead=ahead, **given).mean - exact).abs().max().item()
        assert error < 1e-9, (objective, error)
        compared += 1
    assert compared > 45


def test_stale_completions_are_refused_without_a_correction_and_accepted_with_one() -> None:
    for credit in (m for m in MEMBERS["Credit"] if m.gamma > 0.0 and not isinstance(m, GAE)):
        plain = Objective(GeneralizedJSD(), credit=credit)
        with pytest.raises(DegenerateObjective, match="PrefixProduct"):
            refuse_unfit_source(plain, student_writes=True, others_write=False, steps_per_refresh=2)
        refuse_unfit_source(plain, student_writes=True, others_write=False, steps_per_refresh=1)
        for correction in MEMBERS["Correction"]:
            if type(correction).__name__ in ("TokenRatio", "NoCorrection"):
                continue
            if type(credit).__name__ == "TotalReturn" and type(correction).__name__ == "PrefixProduct":
                continue
            named = Objective(GeneralizedJSD(), credit=credit, correction=correction)
            refuse_unfit_source(named, student_writes=True, others_write=False, steps_per_refresh=2)


# ---- the refusals of written text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [{"target": TeacherTemperature(0.5)}, {"credit": ReturnToGo(analytic=True)}, {"credit": KStep(2)}],
    ids=lambda a: next(iter(a)),
)
def test_axes_that_a_written_token_cannot_use_are_idle(axes: dict) -> None:
    text = {"divergence": package.ForwardKL(), "support": package.WrittenToken(), "reduction": Constant(1.0)}
    with pytest.raises(DegenerateObjective):
        Objective(**text, **axes)
    forced = WORLDS["eos"].moments_of(Objective(**text, **axes, allow_degenerate=True), "teacher").mean
    if not (credit := axes.get("credit")) or not credit.analytic:
        torch.testing.assert_close(forced, WORLDS["eos"].moments_of(Objective(**text), "teacher").mean)


@pytest.mark.parametrize("support", [package.FullVocab(), TopK(2), TopK(2, closure="sampled_tail")], ids=repr)
@pytest.mark.parametrize("axes", [{"shaper": Clip(0.1)}, {"credit": GAE(0.0)}], ids=lambda a: next(iter(a)))
def test_axes_of_the_sampled_token_are_refused_elsewhere(support: object, axes: dict) -> None:
    with pytest.raises(DegenerateObjective, match="only acts on sampled tokens"):
        Objective(package.ReverseKL(), support, **axes)
    if isinstance(support, TopK) and support.sampled:
        return
    forced = Objective(package.ReverseKL(), support, reduction=Constant(1.0), allow_degenerate=True, **axes)
    plain = Objective(package.ReverseKL(), support, reduction=Constant(1.0))
    found = WORLDS["eos"].moments_of(forced).mean
    torch.testing.assert_close(found, WORLDS["eos"].moments_of(plain).mean, atol=1e-12, rtol=0.0)


def test_gae_under_the_sequence_mean_is_a_baseline_that_shifts_the_gradient() -> None:
    axes = {"divergence": package.ReverseKL(), "support": package.SampledToken(), "reduction": SequenceMean()}
    for lam in (0.0, 1.0):
        with pytest.raises(DegenerateObjective, match="GAE's value"):
            Objective(**axes, credit=GAE(1.0, lam))
    plain = Objective(**axes, credit=ReturnToGo())
    forced = Objective(**axes, credit=GAE(1.0, 1.0), allow_degenerate=True)
    for name, low, high in (("eos", 1e-3, 9.0), ("fixed", 0.0, 1e-12)):
        shift = (WORLDS[name].moments_of(forced).mean - WORLDS[name].moments_of(plain).mean).abs().max()
        assert low <= shift <= high


def test_a_renormalised_teacher_is_for_the_forward_kl_alone() -> None:
    """Where the two agree every other divergence still pushes; the forward KL pulls mass onto the support, as declared."""
    table = WORLDS["fixed"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=2)
    support = TopK(2, "teacher", "renormalize_teacher")
    for divergence in (package.ReverseKL(), GeneralizedJSD(0.3)):
        with pytest.raises(DegenerateObjective, match="ForwardKL"):
            Objective(divergence, support)
        forced = Objective(divergence, support, reduction=Constant(1.0), allow_degenerate=True)
        assert agreed.moments_of(forced).mean.abs().max() > 1e-3
    p, law = WORLDS["fixed"].teacher.softmax(-1), WORLDS["fixed"].student.softmax(-1)
    head = torch.zeros_like(p).scatter(-1, p.topk(2).indices, p.topk(2).values)
    head = head / head.sum(-1, keepdim=True)
    reach = WORLDS["fixed"].visitation().detach()
    (exact,) = torch.autograd.grad(-(reach[:, None] * head * law.log()).sum(), WORLDS["fixed"].student)
    found = WORLDS["fixed"].moments_of(Objective(package.ForwardKL(), support, reduction=Constant(1.0))).mean
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0.0)


# ---- nothing is ever NaN -------------------------------------------------------------------------------------------------

VOCAB, LENGTHS = 5, (4, 1, 3)


def rollout_of(seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    written = [
        Completion(tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()), (-1.6,) * n, True, 0) for n in LENGTHS
    ]
    rollout = Rollout.of([Prompt(i, "", (1,), row=i) for i in range(len(LENGTHS))], written, 0)
    top_ids = torch.rand(*rollout.mask.shape, VOCAB, generator=generator).argsort(-1)
    return replace(rollout, top_ids=top_ids, outcome=torch.tensor([1.0, 0.0, 0.75]))


def tables(case: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of student and teacher at their limits; drawn tokens may be forbidden by either."""
    student, teacher = torch.randn(2, sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(7)).to(dtype)
    onehot = torch.full_like(teacher, -math.inf).scatter(-1, torch.randint(VOCAB, (len(teacher), 1)), 0.0)
    match case:
        case "masked in both":
            student[:, 1], teacher[:, 1] = -math.inf, -math.inf
        case "masked in the student":
            student[:, 1:3] = -math.inf
        case "masked in the teacher":
            teacher[:, 1:3] = -math.inf
        case "one-hot teacher":
            teacher = onehot
        case "one-hot student":
            student = onehot
        case "far apart":
            student, teacher = 1e4 * student, 1e4 * teacher
        case "equal":
            teacher = student.clone()
    return student, teacher


CASES = [
    "masked in both",
    "masked in the student",
    "masked in the teacher",
    "one-hot teacher",
    "one-hot student",
    "far apart",
    "equal",
]


def around(axis: str, member: object) -> list[Objective]:
    """A member of one axis with several choices on the others."""
    key = dict(zip(AXES, KEYS, strict=True))[axis]
    out: dict[str, Objective] = {}
    for divergence, support, credit in product(
        (package.ReverseKL(), *((GeneralizedJSD(0.3),) if axis in ("Support", "Credit") else ())),
        (package.FullVocab(), package.SampledToken(), TopK(2, "intersection", "sampled_tail")),
        (package.Immediate(), GAE(0.9, 0.5)) if axis in ("Gate", "Target") else (ReturnToGo(analytic=True), GAE(0.9, 0.5)),
    ):
        picks = {"divergence": divergence, "support": support, "credit": credit, "baseline": package.ClosedFormBaseline()}
        picks[key] = [member] if axis == "Gate" else member
        compared = picks["divergence"]
        if (not compared.separable or compared.heavy_tailed) and picks["support"].sampled:
            continue  # refused: a single token has no advantage, or one without bound
        out[repr(picks)] = Objective(**picks, allow_degenerate=True)
    return list(out.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axis", AXES)
def test_values_and_gradients_are_finite_at_every_limit(axis: str, case: str) -> None:
    rollout = rollout_of(0)
    dtypes = (torch.float32, torch.float64) if case == "masked in the student" else (torch.float32,)
    for member in MEMBERS[axis]:
        for dtype, objective in product(dtypes, around(axis, member)):
            student, teacher = tables(case, dtype)
            student.requires_grad_(True)
            critic = torch.zeros(len(student), dtype=dtype, requires_grad=True)
            extras = Extras(TableLaws(teacher.roll(1, 0)), critic, 0.5, torch.rand(student.shape, dtype=dtype))
            out = objective(TableLaws(student), TableLaws(teacher), rollout, extras=extras)
            (gradient,) = torch.autograd.grad(out.loss, student, allow_unused=True)
            assert torch.isfinite(out.loss), (objective, dtype)
            assert torch.isfinite(out.token_loss).all(), (objective, dtype)
            assert gradient is None or torch.isfinite(gradient).all(), (objective, dtype)


@pytest.mark.parametrize("axis", AXES)
def test_gradient_reaches_student_and_critic_alone(axis: str) -> None:
    """Not the teacher, the reference or what is known of later states, through no weight, gate, baseline or destination."""
    rollout = rollout_of(0)
    for member in MEMBERS[axis]:
        for objective in around(axis, member):
            given = [x.requires_grad_(True) for x in (*tables("plain", torch.float64), torch.randn(sum(LENGTHS), VOCAB))]
            critic, ahead = torch.zeros(sum(LENGTHS), requires_grad=True), torch.randn(sum(LENGTHS), VOCAB, requires_grad=True)
            laws = [TableLaws(x) for x in given]
            out = objective(*laws[:2], rollout, extras=Extras(laws[2], critic, 0.5, ahead))
            found = torch.autograd.grad(out.loss, [*given, ahead, critic], allow_unused=True)
            assert found[0] is not None and found[1:4] == (None, None, None), objective
            assert (found[4] is not None) == objective.needs_critic
            assert not out.token_loss.requires_grad and not any(v.requires_grad for v in out.stats.values.values())


@pytest.mark.parametrize("axis", AXES)
def test_an_empty_mask_is_a_zero_that_backpropagates(axis: str) -> None:
    rollout = rollout_of(0)
    nothing = replace(rollout, text=replace(rollout.text, mask=torch.zeros_like(rollout.mask)))
    for member in MEMBERS[axis]:
        for objective in around(axis, member)[:8]:
            student, empty = torch.zeros(0, VOCAB, requires_grad=True), TableLaws(torch.zeros(0, VOCAB))
            loss = objective(
                TableLaws(student), empty, nothing, extras=Extras(empty, torch.zeros(0), 0.5, torch.zeros(0, VOCAB))
            ).loss
            assert loss.item() == 0.0
            loss.backward()


# ---- masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_masked_tokens_between_the_others_change_nothing(axis: str) -> None:
    """Environment tokens and padding: no advantage, no discount step, no share of any count."""
    rollout = rollout_of(1)
    width = rollout.mask.shape[1]
    spread = torch.tensor([0, *(2 * t + 1 + t % 2 for t in range(width))])  # new place of every column of ids
    ids = torch.full((len(rollout), int(spread[-1]) + 4), 3).index_copy(1, spread, rollout.text.ids)
    mask = torch.zeros(len(rollout), ids.shape[1] - 1, dtype=torch.bool).index_copy(1, spread[1:] - 1, rollout.mask)
    recorded = torch.full(mask.shape, -9.0).index_copy(1, spread[1:] - 1, rollout.sampler_logprobs)
    top_ids = torch.zeros(*mask.shape, VOCAB, dtype=torch.long).index_copy(1, spread[1:] - 1, rollout.top_ids)
    text = replace(rollout.text, ids=ids, mask=mask)
    wide = replace(rollout, text=text, sampler_logprobs=recorded, top_ids=top_ids)
    student, teacher = tables("plain", torch.float64)
    student.requires_grad_(True)
    extras = Extras(
        TableLaws(teacher.roll(1, 0)), torch.linspace(-1.0, 0.0, len(student), dtype=torch.float64), 0.5, student.detach()
    )
    for member in MEMBERS[axis]:
        for objective in around(axis, member):
            narrow, broad = (objective(TableLaws(student), TableLaws(teacher), r, extras=extras) for r in (rollout, wide))
            assert (broad.token_loss[~mask] == 0).all()
            torch.testing.assert_close(broad.token_loss[mask], narrow.token_loss[rollout.mask], atol=1e-13, rtol=0.0)
            found, exact = (torch.autograd.grad(out.loss, student)[0] for out in (broad, narrow))
            torch.testing.assert_close(found, exact, atol=1e-13, rtol=0.0)
