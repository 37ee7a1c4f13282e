"""Objectives for a teacher that tells the likeliest entries of its laws alone: which are exact there, and which are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.objectives.baselines import NoBaseline, RolloutMean
from opd_lightning.objectives.routes import Vanilla
from opd_lightning.objectives.supports import SampledToken, TopK, WrittenToken
from opd_lightning.objectives.targets import TeacherLaw

if TYPE_CHECKING:
    from opd_lightning.objectives.objective import Objective


def refuse_beyond(objective: Objective, known: int) -> None:
    """Check an objective against what the teacher tells: its ``known`` likeliest entries, their tail's mass, the drawn token.

    Raises:
        ValueError: naming what is missing and what to write instead.
    """
    for part, _ in objective.flat():
        if part.needs_teacher and (found := _beyond(part, known)) is not None:
            raise ValueError(
                f"the teacher tells its {known} likeliest tokens, the mass of the others and the drawn token, but {found[0]}.\n"
                f"  Write instead: {found[1]}\n"
                "  Or take a teacher that tells all: model.teacher: FrozenTeacher."
            )


def _beyond(objective: Objective, known: int) -> tuple[str, str] | None:
    """What an objective needs besides, and the remedy; None if it is exact."""
    support, target, baseline = objective.support, objective.target, objective.baseline
    top_k = f"objective.support: {{class_path: TopK, init_args: {{k: {known}, by: teacher, closure: tail}}}}"
    if isinstance(support, TopK):
        if support.by in ("student", "union"):
            entries = (
                "picks entries that the student finds likely" if support.by == "student" else "joins the student's entries"
            )
            return f"{support.title} {entries}", f"{top_k} (or by: intersection)"
        if support.k > known:
            return f"{support.title} looks at more", f"{top_k}, or raise model.teacher.k"
    elif not isinstance(support, WrittenToken) and not (isinstance(support, SampledToken) and support.k == 0):
        return f"{support.title} looks at all entries, or at those that the student finds likely", (
            f"{top_k}, or objective.support: SampledToken"
        )
    checks = (
        (type(target) is not TeacherLaw, f"the target ({target.title}) mixes whole laws", "objective.target: TeacherLaw"),
        (objective.temperature != 1.0, "another temperature needs every logit", "objective.temperature: 1.0"),
        (
            not isinstance(baseline, (NoBaseline, RolloutMean)),
            f"{type(baseline).__name__} sums over all entries",
            "objective.baseline: NoBaseline (or GroupMean, BatchMean)",
        ),
        (
            objective.credit.analytic,
            f"credit {objective.credit.title} needs exact divergences of later states",
            "objective.credit: Immediate, or Discounted with analytic: false",
        ),
        (type(objective.route) is not Vanilla, "a route moves mass among all entries", "objective.route: Vanilla"),
    )
    for beyond, cause, remedy in checks:
        if beyond:
            return cause, remedy
    for gate in objective.gates:
        if gate.needs_teacher and gate.needs_law:
            return f"the gate {type(gate).__name__} looks at the teacher's whole law", "gates of drawn tokens or positions"
    return None
