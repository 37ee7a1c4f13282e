"""Targets: the gradient is that of the textbook divergence to a law that is held fixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.objectives import (
    Constant,
    Extrapolation,
    Extras,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    GeometricBridge,
    Immediate,
    Interpolation,
    Objective,
    ReferenceLaw,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Skewed,
    Target,
    TeacherLaw,
    TeacherTemperature,
    TopK,
    UniformLaw,
)
from tests.objectives.textbook import Book, close, reverse_kl, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)
Row = list[float]


def normalised(row: Row) -> Row:
    return [x / sum(row) for x in row]


def mixed(share: float) -> Callable[[Row, Row, Row], Row]:
    return lambda p, q, ref: [(1 - share) * b + share * a for a, b in zip(p, q, strict=True)]


def geometric(share: float) -> Callable[[Row, Row, Row], Row]:
    return lambda p, q, ref: normalised([b ** (1 - share) * a**share for a, b in zip(p, q, strict=True)])


LAWS: list[tuple[Target, float, Callable[[Row, Row, Row], Row]]] = [
    (TeacherLaw(), 0.0, lambda p, q, ref: q),
    (TeacherTemperature(0.6), 0.0, lambda p, q, ref: normalised([x ** (1 / 0.6) for x in q])),
    (Skewed(0.3), 0.0, mixed(0.3)),
    (Skewed(0.0), 0.0, mixed(0.0)),
    (GeometricBridge(0.3), 0.0, geometric(0.3)),
    (GeometricBridge(0.0), 0.0, geometric(0.0)),
    (Interpolation(0.2, 0.8), 0.0, geometric(0.8)),
    (Interpolation(0.2, 0.8), 0.5, geometric(0.5)),
    (Interpolation(0.2, 0.8), 1.0, geometric(0.2)),
    (Interpolation(0.0, 1.0), 1.0, geometric(0.0)),
    (Extrapolation(1.25), 0.0, lambda p, q, ref: normalised([b**1.25 * c**-0.25 for b, c in zip(q, ref, strict=True)])),
    (Extrapolation(0.5), 0.0, lambda p, q, ref: normalised([b**0.5 * c**0.5 for b, c in zip(q, ref, strict=True)])),
    (ReferenceLaw(), 0.0, lambda p, q, ref: ref),
    (UniformLaw(), 0.0, lambda p, q, ref: [1 / len(q)] * len(q)),
]
DIVERGENCES: dict[str, tuple[object, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "reverse": (ReverseKL(), reverse_kl),
    "forward": (ForwardKL(), lambda p, q: (q * (q / p).log()).sum()),
    "jsd": (
        GeneralizedJSD(0.3),
        lambda p, q: sum(w * (a * (a / (0.3 * q + 0.7 * p)).log()).sum() for w, a in ((0.3, q), (0.7, p))),
    ),
}


def test_every_target_of_the_package_is_here() -> None:
    assert {type(target) for target, _, _ in LAWS} == set(Target.__subclasses__())


@each_world
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(
    ("target", "progress", "law"), LAWS, ids=lambda x: getattr(x, "title", x if x in (0.0, 0.5, 1.0) else "")
)
def test_gradient_of_the_divergence_to_the_fixed_target(
    name: str, kind: str, target: Target, progress: float, law: Callable[[Row, Row, Row], Row]
) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    divergence, formula = DIVERGENCES[kind]
    student, total = at.student.softmax(-1), torch.zeros((), dtype=torch.float64)
    for path in at.paths:
        for s in path.states:
            aim = torch.tensor(law(book.p[s], book.q[s], book.mu[s]), dtype=torch.float64)
            total = total + path.student * formula(student[s], aim)
    (exact,) = torch.autograd.grad(total, at.student)
    given = {"reference": at.sampler, "progress": progress}  # the world's third law is the reference here
    for support in (FullVocab(), TopK(3, closure="tail"), SampledToken()):
        if isinstance(support, SampledToken) and kind == "forward":
            continue
        objective = Objective(divergence, support, reduction=Constant(1.0), target=target)
        close(at.moments_of(objective, **given).mean, exact, 1e-9 if isinstance(support, TopK) else 1e-10)
        close(at.declared_gradient(objective, **given), exact, 1e-9 if isinstance(support, TopK) else 1e-10)


def test_a_temperature_divides_the_logits_of_all_three_models() -> None:
    at, tau = WORLDS["eos"], 1.7
    logits = (at.student, at.teacher, at.sampler)
    p, q, ref = ((z / tau).softmax(-1) for z in logits)
    aim = q**1.25 * ref.detach() ** -0.25
    aim = aim / aim.sum(-1, keepdim=True)
    total = sum(path.student * sum(reverse_kl(p[s], aim[s]) for s in path.states) for path in at.paths)
    objective = Objective(ReverseKL(), reduction=Constant(1.0), target=Extrapolation(1.25), temperature=tau)
    close(at.moments_of(objective, reference=at.sampler).mean, torch.autograd.grad(total, at.student)[0])


@each_world
def test_limits(name: str) -> None:
    at = WORLDS[name]
    for support in (FullVocab(), SampledToken()):
        for credit in (Immediate(), ReturnToGo()):

            def found(target: Target, progress: float = 0.0, axes: tuple = (support, credit)) -> torch.Tensor:
                objective = Objective(ReverseKL(), *axes, reduction=Constant(1.0), target=target)
                return at.gradients_of(objective, reference=at.sampler, progress=progress)

            teacher = found(TeacherLaw())
            for same in (TeacherTemperature(1.0), Skewed(0.0), GeometricBridge(0.0), Extrapolation(1.0)):
                close(found(same), teacher, 1e-12)
            close(found(Interpolation(0.0, 1.0), 1.0), teacher, 1e-12)
            assert found(Interpolation(0.0, 1.0), 0.0).abs().max() < 1e-12  # at the start the target is the student
            close(found(Interpolation(0.2, 0.6), 0.5), found(GeometricBridge(0.6)), 1e-12)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_forward_kl_to_the_geometric_bridge_descends_a_renyi_divergence(share: float) -> None:
    """Of order 1 - share, teacher from student: log(sum q^a p^(1-a)) / (a - 1)."""
    at, order = WORLDS["eos"], 1 - share
    p, q = at.student.softmax(-1), at.teacher.softmax(-1)
    renyi = (q**order * p ** (1 - order)).sum(-1).log() / (order - 1)
    total = sum(path.student * sum(renyi[s] for s in path.states) for path in at.paths)
    (exact,) = torch.autograd.grad(total, at.student)
    objective = Objective(ForwardKL(), reduction=Constant(1.0), target=GeometricBridge(share))
    close(at.moments_of(objective).mean, exact)


def test_the_uniform_law_is_an_entropy_bonus() -> None:
    at = WORLDS["eos"]
    p = at.student.softmax(-1)
    bonus = -sum(path.student * sum(-(p[s] * p[s].log()).sum() for s in path.states) for path in at.paths)
    (exact,) = torch.autograd.grad(bonus, at.student)
    for support in (FullVocab(), SampledToken()):
        objective = Objective(ReverseKL(), support, reduction=Constant(1.0), target=UniformLaw())
        close(at.moments_of(objective).mean, exact)


def test_a_detached_mixture_is_not_the_differentiated_one() -> None:
    at = WORLDS["eos"]
    p, q = at.student.softmax(-1), at.teacher.softmax(-1)
    total = sum(path.student * sum(reverse_kl(p[s], 0.7 * q[s] + 0.3 * p[s]) for s in path.states) for path in at.paths)
    (through,) = torch.autograd.grad(total, at.student)
    objective = Objective(ReverseKL(), reduction=Constant(1.0), target=Skewed(0.3))
    assert (at.moments_of(objective).mean - through).abs().max() > 1e-2


@pytest.mark.parametrize("target", [target for target, _, _ in LAWS], ids=lambda t: t.title)
def test_no_gradient_reaches_teacher_or_reference(target: Target) -> None:
    at = WORLDS["eos"]
    path = at.paths[-1]
    states = torch.tensor(path.states)
    models = [t.detach()[states].requires_grad_(True) for t in (at.student, at.teacher, at.sampler)]
    for support in (FullVocab(), SampledToken()):
        for credit in (Immediate(), ReturnToGo(analytic=True)):
            objective = Objective(ReverseKL(), support, credit, target=target)
            extras = Extras(TableLaws(models[2]), None, 0.5)
            loss = objective(TableLaws(models[0]), TableLaws(models[1]), at.rollout(path), extras=extras).loss
            found = torch.autograd.grad(loss, models, allow_unused=True)
            assert found[0].abs().max() > 0
            assert found[1] is None and found[2] is None


@pytest.mark.parametrize(("target", "progress"), [(t, x) for t, x, _ in LAWS], ids=lambda x: getattr(x, "title", ""))
def test_three_equal_models_leave_nothing_to_learn(target: Target, progress: float) -> None:
    if isinstance(target, (UniformLaw, TeacherTemperature)):
        return  # aim elsewhere by design
    table = WORLDS["eos"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=3, eos=2)
    for support in (FullVocab(), SampledToken()):
        objective = Objective(ReverseKL(), support, ReturnToGo(), reduction=Constant(1.0), target=target)
        assert agreed.gradients_of(objective, reference=table, progress=progress).abs().max() < 1e-13


def test_targets_name_themselves() -> None:
    for target, _, _ in LAWS:
        declared = Objective(ReverseKL(), target=target).declared_target
        assert target.title in declared.name
        assert declared.defect is None
