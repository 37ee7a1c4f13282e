"""What a composition descends, and which compositions are refused.

The table behind it: "A Formula-Driven Survey and Research Agenda for On-Policy Distillation" (arXiv 2606.22793) for the
estimators, "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) for truncated supports. Every entry is compared
with an exact enumeration in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from opd_lightning.objectives.divergences import Divergence, ForwardKL, GeneralizedJSD
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
        formula: the equation behind the defect, with p the student and q the teacher.
        remedy: the configuration line to write instead.
    """

    name: str
    parts: tuple[str, ...]
    biases: tuple[str, ...] = ()
    defect: str | None = None
    formula: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        bias = "; ".join(self.biases) or "unbiased"
        return f"{self.name} ({', '.join(self.parts)}): {self.defect or bias}"


class Defect(NamedTuple):
    """Why a combination must not be trained with: in words, as an equation, and what to write instead."""

    cause: str
    formula: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}.\n  Formula: {self.formula}\n  Write instead: {self.remedy}"


def _defect_of_top_k(divergence: Divergence, support: TopK) -> Defect | None:
    if support.closure == "renormalize" and support.k == 1 and support.by != "union":
        return Defect(
            "renormalised on one entry, student and teacher are both 1 there: loss and gradient are exactly 0",
            "p_1 / p_1 = 1 = q_1 / q_1 whatever p is",
            "support.k: 16, or support.closure: tail",
        )
    if support.closure == "raw" and isinstance(divergence, GeneralizedJSD):
        return Defect(
            "for a JSD the raw closure is the stop_gradient closure under another name",
            "p f(q / p) with f'(1) = 0 already",
            "closure: stop_gradient",
        )
    if support.closure == "raw" and isinstance(divergence, ForwardKL):
        return Defect(
            "a truncated forward KL pulls all mass onto the support, also where student and teacher agree",
            "at p = q: grad sum_S q (log q - log p) = - grad sum_S p",
            "support.closure: tail (or renormalize, stop_gradient)",
        )
    if support.closure == "raw":
        return Defect(
            "a truncated reverse KL descends the student's own mass on the support (its optimum is p = q / e there), "
            "also where student and teacher agree",
            "grad sum_S p (log p - log q) = sum_S (log p - log q + 1) grad p, which at p = q is grad sum_S p",
            "support.closure: tail (or renormalize, stop_gradient)",
        )
    return None


def defect_of(objective: Objective) -> Defect | None:
    """What is wrong with a combination, or None."""
    divergence, support, credit = objective.divergence, objective.support, objective.credit
    if isinstance(support, TopK) and (found := _defect_of_top_k(divergence, support)):
        return found
    if isinstance(support, SampledToken) and divergence.heavy_tailed:
        return Defect(
            f"the {divergence.title} on a token that the student sampled is an importance weight q / p: its variance has "
            "no bound",
            "E_{y ~ p} (q / p)^2 = sum_v q_v^2 / p_v",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, by: teacher}}",
        )
    if isinstance(support, WrittenToken):
        if not isinstance(divergence, ForwardKL):
            return Defect(
                f"a written token always descends the likelihood of the text, not a {divergence.title}",
                "E_{y ~ writer} grad -log p(y) = grad KL(writer ‖ p)",
                "divergence: ForwardKL",
            )
        if credit.gamma > 0.0:
            return Defect(
                "a written text is not moved by the student: no token answers for later ones",
                "grad writer(y) = 0",
                "credit: Immediate",
            )
    if objective.baseline.present and not support.sampled:
        return Defect(
            "a baseline only acts on sampled tokens; exact sums have no sampling noise",
            "sum_v p_v b grad log p_v = b grad 1 = 0",
            "baseline: NoBaseline",
        )
    if objective.baseline.present and isinstance(objective.reduction, SequenceMean):
        return Defect(
            "with the sequence mean a token's weight 1 / length depends on what was sampled, so a baseline changes the "
            "expected gradient",
            "E[b(s_t) / |y| grad log p(y_t)] != 0, because |y| depends on y_t",
            "reduction: TokenMean, or baseline: NoBaseline",
        )
    return None


def _biases(objective: Objective) -> tuple[str, ...]:
    support, credit, reduction = objective.support, objective.credit, objective.reduction
    out = []
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
        defect=problem.cause if problem else None,
        formula=problem.formula if problem else None,
        remedy=problem.remedy if problem else None,
    )


def refuse_if_degenerate(objective: Objective) -> None:
    """Raises:
    DegenerateObjective: naming defect, formula and remedy, unless the objective allows it.
    """
    problem = defect_of(objective)
    if problem and not objective.allow_degenerate:
        raise DegenerateObjective(
            f"{type(objective.divergence).__name__} with {', '.join(declare(objective).parts)} is refused: {problem}\n"
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
        problem = Defect(
            "WrittenToken on the student's own completions has expected gradient zero: the student imitates itself",
            "E_{y ~ p} grad log p(y) = sum_y grad p(y) = grad 1 = 0",
            "rollout.source: TeacherSource (or DatasetSource), or support: FullVocab",
        )
        raise DegenerateObjective(str(problem))
    if gamma > 0.0 and others_write:
        problem = Defect(
            f"credit {objective.credit.title} follows how the student's tokens move its later states, but the source also "
            "hands out completions that the student did not write",
            "grad E_{y ~ p} cost = E_{y ~ p} [grad cost + cost grad log p(y)], y drawn from p",
            "rollout.source: StudentSource, or credit: Immediate",
        )
        raise DegenerateObjective(str(problem))
    if gamma > 0.0 and steps_per_refresh > 1:
        problem = Defect(
            f"credit {objective.credit.title} needs completions of the current student, but a refresh serves "
            f"{steps_per_refresh} optimizer steps",
            "grad E_{y ~ p} cost = E_{y ~ p} [grad cost + cost grad log p(y)], y drawn from the p of this step",
            "rollout.every_n_steps: 1 and rollout.passes: 1, or credit: Immediate",
        )
        raise DegenerateObjective(str(problem))
