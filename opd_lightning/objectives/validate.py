"""What a composition descends, in words.

The table behind it: "A Formula-Driven Survey and Research Agenda for On-Policy Distillation" (arXiv 2606.22793) for the
estimators, "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) for truncated supports. Every entry is compared
with an exact enumeration in the tests. What is refused, and why, stands in `opd_lightning.objectives.defects`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_lightning.objectives.baselines import ClosedFormBaseline
from opd_lightning.objectives.corrections import TokenRatio
from opd_lightning.objectives.credits import GAE, Discounted
from opd_lightning.objectives.defects import Defect, DegenerateObjective, defect_of, refuse_unfit_part
from opd_lightning.objectives.gates import PositionDecay
from opd_lightning.objectives.reductions import SequenceMean, TokenMean
from opd_lightning.objectives.supports import MatchedVocab, SampledToken, TopK, WrittenToken

if TYPE_CHECKING:
    from opd_lightning.objectives.objective import Objective


COARSE = " of the top-k-plus-tail coarsening"
LOWER_BOUND = "a lower bound of the full divergence, off by at most what the tail hides (tail mass)"


@dataclass(frozen=True)
class DeclaredTarget:
    """The gradient that an objective follows.

    Attributes:
        name: the quantity that it descends, or ``none``.
        parts: support, credit, baseline and reduction in words.
        biases: what separates the expected gradient from that of the plain divergence.
        defect: why the combination is refused; None if it is sound.
        formula: the defect as an equation.
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


def _biases(objective: Objective) -> tuple[str, ...]:
    support, credit, reduction = objective.support, objective.credit, objective.reduction
    out = []
    if objective.divergence.frozen:
        out.append("a part of the divergence is held fixed, so the gradient is not that of its value")
    if isinstance(support, TopK):
        out.append(
            {
                "tail": LOWER_BOUND,
                "renormalize": "blind to how much mass lies outside the support",
                "renormalize_teacher": "pulls all mass onto the support",
                "stop_gradient": "what lies outside the support is not compared",
                "sampled_tail": "",
                "raw": "descends the student's mass on the support",
            }[support.closure]
        )
    if isinstance(support, SampledToken) and support.k:
        out.append(LOWER_BOUND)
    if isinstance(support, MatchedVocab):
        out.append(
            "between two vocabularies: positions at which only one tokenizer begins a token are not scored, and mass goes from "
            "tokens of the student alone to the shared ones with which they begin, so it learns to spell as the teacher reads"
        )
    if support.record_top_k:
        out.append("on stale rollouts the support is that of the student who wrote")
    out.append("" if _time_discounted(objective) else credit.bias)
    if isinstance(reduction, SequenceMean) and (objective.needs_sampler or not support.needs_teacher):
        out.append("the weight 1 / length depends on the drawn tokens where completions can end early")
    if isinstance(reduction, TokenMean):
        out.append("divided by the sampled number of tokens (a ratio estimate, bias of order 1 / batch)")
    if objective.shaper.title:
        out.append("the signal is bent: the same fixed point, not the gradient of the divergence")
    out.append(bias_of_route(objective))
    out.append(objective.outcome.bias)
    correction = objective.correction
    if objective.needs_sampler and correction.bias and not isinstance(correction, TokenRatio):
        out.append(f"on stale rollouts {correction.bias}")
    if objective.gates and not _time_discounted(objective):
        out.append(_bias_of_gates(objective))
    return tuple(bias for bias in out if bias)


def bias_of_route(objective: Objective) -> str:
    """Empty for none. Balanced canonical routing is without bias where the routed signal is the exact local advantage."""
    exact = isinstance(objective.baseline, ClosedFormBaseline) or isinstance(objective.credit, GAE)
    if objective.route.bias or not objective.route.balanced or objective.route.strength == 0.0:
        return objective.route.bias
    if objective.credit.gamma == 0.0 and exact and not objective.shaper.title:
        return ""
    return "the canonical route balances local advantages alone, not those of another baseline, shaper or credit"


def _bias_of_gates(objective: Objective) -> str:
    if any(gate.depends_on != "state" for gate in objective.gates):
        return "gates look at drawn tokens: not the gradient of a weighted divergence, though 0 where both models agree"
    if objective.credit.gamma == 0.0:
        return "states weigh as the gates say"
    return "gates weigh a token with all that it answers for: not the gradient of a weighted divergence"


def _time_discounted(objective: Objective) -> bool:
    """gamma^t times credit discounted by gamma: the gradient of ``E sum_t gamma^t D(s_t)``."""
    credit, gates = objective.credit, objective.gates
    return (
        len(gates) == 1
        and isinstance(gates[0], PositionDecay)
        and isinstance(credit, Discounted)
        and credit.gamma == gates[0].gamma
    )


def declare(objective: Objective) -> DeclaredTarget:
    """Name the gradient of a composition."""
    support, credit = objective.support, objective.credit
    title = objective.divergence.title
    if objective.target.title:
        title += f" to {objective.target.title}"
    if isinstance(support, SampledToken) and support.k:
        title += COARSE
    if isinstance(support, TopK):
        title = {
            "tail": title + COARSE,
            "renormalize": f"{title} of both laws renormalised on the top-k",
            "renormalize_teacher": f"{title} from the teacher renormalised on the top-k",
            "stop_gradient": f"generalised {title} on the top-k",
            "sampled_tail": title,
            "raw": f"truncated {title}",
        }[support.closure]
    level = f"time-discounted (gamma={credit.gamma:g}) sequence-level" if _time_discounted(objective) else credit.level
    name = f"{title} from the writer of the text" if isinstance(support, WrittenToken) else f"{level} {title}"
    name = objective.outcome.named(name)
    parts = [support.title, f"{credit.title} credit", objective.baseline.title, objective.shaper.title]
    parts += [gate.title for gate in objective.gates]
    parts += [objective.route.title, objective.outcome.title, objective.reduction.title]
    if objective.needs_sampler and not isinstance(objective.correction, TokenRatio):
        parts.append(objective.correction.title)
    if objective.temperature != 1.0:
        parts.append(f"both laws at temperature {objective.temperature:g}")
    problem = defect_of(objective)
    return DeclaredTarget(
        name="none" if problem else name,
        parts=tuple(part for part in parts if part),
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
    for part, rows in objective.flat():
        own, foreign = student_writes and rows != "others", others_write and rows != "student"
        if not own and not foreign:
            problem = Defect(
                f"a term learns from {'the student' if rows == 'student' else 'other writers'} alone, who write nothing here",
                "a sum over no rows is 0",
                "rollout.source: MixtureSource, or leave the term out",
            )
            raise DegenerateObjective(str(problem))
        refuse_unfit_part(part, own, foreign, steps_per_refresh)
