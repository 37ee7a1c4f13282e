"""What a composition descends, and which compositions are refused.

The table behind it: "A Formula-Driven Survey and Research Agenda for On-Policy Distillation" (arXiv 2606.22793) for the
estimators, "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) for truncated supports. Every entry is compared
with an exact enumeration in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_lightning.objectives.divergences import Divergence, ForwardKL, ReverseKL
from opd_lightning.objectives.reductions import SequenceMean, TokenMean
from opd_lightning.objectives.supports import SampledToken, TopK, WrittenToken

if TYPE_CHECKING:
    from opd_lightning.objectives.objective import Objective


class DegenerateObjective(ValueError):
    """A combination that optimises nothing, or something else than its name says."""


@dataclass(frozen=True)
class DeclaredTarget:
    """The gradient that an objective follows.

    Attributes:
        name: the quantity that it descends, or ``none``.
        parts: support, credit, baseline and reduction in words.
        biases: what separates the expected gradient from that of the plain divergence.
        defect: why the combination is refused; None if it is sound.
        remedy: the configuration line to write instead.
    """

    name: str
    parts: tuple[str, ...]
    biases: tuple[str, ...] = ()
    defect: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        bias = "; ".join(self.biases) or "unbiased"
        return f"{self.name} ({', '.join(self.parts)}): {self.defect or bias}"


def defect_of(objective: Objective) -> tuple[str, str] | None:
    """(defect, remedy) of a combination that must not be trained with, or None."""
    divergence, support, credit = objective.divergence, objective.support, objective.credit
    if isinstance(support, TopK):
        if support.closure == "renormalize" and support.k == 1 and support.by != "union":
            return (
                "renormalised on one entry, student and teacher are both 1 there: loss and gradient are exactly 0",
                "support.k: 16, or support.closure: tail",
            )
        if support.closure in ("raw", "stop_gradient") and not divergence.separable:
            return (
                f"the {divergence.title} is not a sum over entries: no part of a law alone has one",
                "support.closure: tail (or renormalize)",
            )
        if support.closure == "raw":
            return _truncation_defect(divergence), "support.closure: tail (or renormalize, stop_gradient)"
    if isinstance(support, SampledToken) and not divergence.separable:
        return (
            f"the {divergence.title} couples all entries: a single token has no advantage",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, closure: tail}}",
        )
    if isinstance(support, SampledToken) and divergence.heavy_tailed:
        return (
            f"the {divergence.title} on a token that the student sampled grows with the importance weight q / p: its variance "
            "has no bound",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, by: teacher}}",
        )
    if isinstance(support, WrittenToken):
        if not isinstance(divergence, ForwardKL):
            return (
                f"a written token always descends the likelihood of the text, not a {divergence.title}",
                "divergence: ForwardKL",
            )
        if credit.gamma > 0.0:
            return "a written text is not moved by the student: no token answers for later ones", "credit: Immediate"
    if objective.baseline.present and not support.sampled:
        return "a baseline only acts on sampled tokens; exact sums have no sampling noise", "baseline: NoBaseline"
    if objective.baseline.present and isinstance(objective.reduction, SequenceMean):
        return (
            "with the sequence mean a token's weight 1 / length depends on what was sampled, so a baseline changes the "
            "expected gradient",
            "reduction: TokenMean, or baseline: NoBaseline",
        )
    return None


def _truncation_defect(divergence: Divergence) -> str:
    """What a sum of textbook entries over a part of the vocabulary descends besides the divergence."""
    if divergence.slope == 0.0:
        return f"for a {divergence.title} the raw closure is the stop_gradient closure under another name"
    if divergence.slope > 0.0:
        return f"a truncated {divergence.title} pulls all mass onto the support, also where student and teacher agree"
    optimum = " (its optimum is p = q / e there)" if isinstance(divergence, ReverseKL) else ""
    return (
        f"a truncated {divergence.title} descends the student's own mass on the support{optimum}, also where student and "
        "teacher agree"
    )


def _biases(objective: Objective) -> tuple[str, ...]:
    support, credit, reduction = objective.support, objective.credit, objective.reduction
    out = []
    if objective.divergence.frozen:
        out.append("a part of the divergence is held fixed, so the gradient is not that of its value")
    if isinstance(support, TopK):
        out.append(
            {
                "tail": "a lower bound of the full divergence, off by at most what the tail hides (tail mass)",
                "renormalize": "blind to how much mass lies outside the support",
                "stop_gradient": "what lies outside the support is not compared",
                "raw": "descends the student's mass on the support",
            }[support.closure]
        )
    if 0.0 < credit.gamma < 1.0:
        out.append("neither the token-level nor the sequence-level gradient, nor that of any scalar")
    if isinstance(reduction, SequenceMean) and (support.sampled or not support.needs_teacher or credit.gamma > 0.0):
        out.append("the weight 1 / length depends on the drawn tokens where completions can end early")
    if isinstance(reduction, TokenMean):
        out.append("divided by the sampled number of tokens (a ratio estimate, bias of order 1 / batch)")
    return tuple(out)


def declare(objective: Objective) -> DeclaredTarget:
    """Name the gradient of a composition."""
    divergence, support, credit = objective.divergence, objective.support, objective.credit
    title = divergence.title
    if isinstance(support, TopK):
        title = {
            "tail": f"{title} of the top-k-plus-tail coarsening",
            "renormalize": f"{title} of both laws renormalised on the top-k",
            "stop_gradient": f"generalised {title} on the top-k",
            "raw": f"truncated {title}",
        }[support.closure]
    if isinstance(support, WrittenToken):
        name = f"{title} from the writer of the text"
    elif credit.gamma == 0.0:
        name = f"token-level {title}"
    elif credit.gamma == 1.0:
        name = f"sequence-level {title}"
    else:
        name = f"discounted {title} (gamma={credit.gamma:g})"
    parts = [support.title, f"{credit.title} credit", objective.reduction.title]
    if objective.baseline.present:
        parts.append("closed-form baseline")
    if objective.temperature != 1.0:
        parts.append(f"both laws at temperature {objective.temperature:g}")
    problem = defect_of(objective)
    return DeclaredTarget(
        name="none" if problem else name,
        parts=tuple(parts),
        biases=_biases(objective),
        defect=problem[0] if problem else None,
        remedy=problem[1] if problem else None,
    )


def refuse_if_degenerate(objective: Objective) -> None:
    """Raises:
    DegenerateObjective: naming defect and remedy, unless the objective allows it.
    """
    target = declare(objective)
    if target.defect and not objective.allow_degenerate:
        raise DegenerateObjective(
            f"{type(objective.divergence).__name__} with {', '.join(target.parts)} is refused: {target.defect}.\n"
            f"  Write instead: {target.remedy}\n"
            "  To train it all the same (to study the failure), set `objective.allow_degenerate: true`."
        )


def refuse_unfit_source(objective: Objective, *, student_writes: bool, others_write: bool, steps_per_refresh: int) -> None:
    """Check an objective against who writes its completions.

    Args:
        objective: what is descended.
        student_writes: the source may hand out the student's own completions.
        others_write: the source may hand out completions of the teacher or of a data set.
        steps_per_refresh: optimizer steps that use one refresh (all passes); more than 1 means stale states.

    Raises:
        DegenerateObjective: if the pair optimises nothing or has no defined gradient.
    """
    if objective.allow_degenerate:
        return
    support, gamma = objective.support, objective.credit.gamma
    if isinstance(support, WrittenToken) and student_writes:
        raise DegenerateObjective(
            "WrittenToken on the student's own completions has expected gradient zero: the student imitates itself.\n"
            "  Write instead: rollout.source: TeacherSource (or DatasetSource), or support: FullVocab"
        )
    if gamma > 0.0 and others_write:
        raise DegenerateObjective(
            f"credit {objective.credit.title} follows how the student's tokens move its later states, but the source also "
            "hands out completions that the student did not write.\n"
            "  Write instead: rollout.source: StudentSource, or credit: Immediate"
        )
    if gamma > 0.0 and steps_per_refresh > 1:
        raise DegenerateObjective(
            f"credit {objective.credit.title} needs completions of the current student, but a refresh serves "
            f"{steps_per_refresh} optimizer steps.\n"
            "  Write instead: rollout.every_n_steps: 1 and rollout.passes: 1, or credit: Immediate"
        )
