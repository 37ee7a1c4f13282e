"""What a composition descends, and which compositions are refused.

The table behind it: "A Formula-Driven Survey and Research Agenda for On-Policy Distillation" (arXiv 2606.22793) for the
estimators, "The Many Faces of On-Policy Distillation" (arXiv 2605.11182) for truncated supports. Every entry is compared
with an exact enumeration in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_lightning.objectives.baselines import ClosedFormBaseline
from opd_lightning.objectives.corrections import NoCorrection, PrefixProduct, TokenRatio
from opd_lightning.objectives.credits import GAE, Discounted, TotalReturn
from opd_lightning.objectives.divergences import ForwardKL, GeneralizedJSD, ReverseKL
from opd_lightning.objectives.gates import PositionDecay, PositionImportance
from opd_lightning.objectives.reductions import SequenceMean, TokenMean
from opd_lightning.objectives.supports import SampledToken, TopK, WrittenToken
from opd_lightning.objectives.targets import TeacherLaw

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
    for check in (_defect_of_topk, _defect_of_text, _defect_of_idle_axis, _defect_of_sampling):
        if (found := check(objective)) is not None:
            return found
    return None


def _defect_of_topk(objective: Objective) -> tuple[str, str] | None:
    divergence, support = objective.divergence, objective.support
    if not isinstance(support, TopK):
        return None
    if support.closure == "renormalize" and support.k == 1 and support.by != "union":
        return (
            "renormalised on one entry, student and teacher are both 1 there: loss and gradient are exactly 0",
            "support.k: 16, or support.closure: tail",
        )
    if support.closure == "renormalize_teacher" and not isinstance(divergence, ForwardKL):
        return (
            "a teacher renormalised on its top-k is 0 elsewhere, where every divergence but the forward KL is infinite or "
            "made of the cut alone",
            "divergence: ForwardKL, or support.closure: tail",
        )
    if support.closure != "raw":
        return None
    if isinstance(divergence, GeneralizedJSD):
        return "for a JSD the raw closure is the stop_gradient closure under another name", "closure: stop_gradient"
    if isinstance(divergence, ForwardKL):
        return (
            "a truncated forward KL pulls all mass onto the support, also where student and teacher agree",
            "support.closure: tail (or renormalize, stop_gradient)",
        )
    return (
        "a truncated reverse KL descends the student's own mass on the support (its optimum is p = q / e there), "
        "also where student and teacher agree",
        "support.closure: tail (or renormalize, stop_gradient)",
    )


def _defect_of_text(objective: Objective) -> tuple[str, str] | None:
    if not isinstance(objective.support, WrittenToken):
        return None
    if not isinstance(objective.divergence, ForwardKL):
        return (
            f"a written token always descends the likelihood of the text, not a {objective.divergence.title}",
            "divergence: ForwardKL",
        )
    if objective.credit.gamma > 0.0:
        return "a written text is not moved by the student: no token answers for later ones", "credit: Immediate"
    if not isinstance(objective.target, TeacherLaw):
        return "a written token is its own target; no law is compared with it", "target: TeacherLaw"
    if any(gate.needs_teacher for gate in objective.gates):
        return "a written token has no teacher's law that a gate could look at", "gates: [] (or gates of position)"
    return None


def _defect_of_sampling(objective: Objective) -> tuple[str, str] | None:
    """Combinations of sampled tokens that are unbounded or biased by themselves."""
    divergence, support, credit = objective.divergence, objective.support, objective.credit
    if support.sampled and divergence.heavy_tailed:
        return (
            f"the {divergence.title} on a token that the student sampled is an importance weight q / p: its variance has "
            "no bound",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, by: teacher}}",
        )
    if isinstance(credit, GAE) and objective.baseline.present:
        return "GAE subtracts its own value; a second baseline would count the state twice", "baseline: NoBaseline"
    if (objective.baseline.present or isinstance(credit, GAE)) and isinstance(objective.reduction, SequenceMean):
        return (
            "with the sequence mean a token's weight 1 / length depends on what was sampled, so a baseline (GAE's value is "
            "one) changes the expected gradient",
            "reduction: TokenMean, or baseline: NoBaseline",
        )
    if isinstance(objective.correction, PrefixProduct) and isinstance(credit, (GAE, TotalReturn)):
        return (
            f"{credit.title} gives a token what stands before it or at its own state, which the ratios up to there do not "
            "correct",
            "credit: ReturnToGo, or correction: TokenRatio",
        )
    if objective.route.title and not isinstance(divergence, ReverseKL):
        return f"routes are derived for the reverse KL, not for the {divergence.title}", "divergence: ReverseKL"
    if objective.route.title and not (objective.baseline.present or isinstance(credit, GAE)):
        return (
            "without a baseline a negative signal only says that the student likes a token more than the teacher does, not "
            "that less of it helps: about one routed step in ten then raises the divergence",
            "baseline: ClosedFormBaseline",
        )
    return None


def _defect_of_idle_axis(objective: Objective) -> tuple[str, str] | None:
    """Choices that would silently do nothing."""
    on_token = isinstance(objective.support, SampledToken)
    for used, what, line in (
        (objective.baseline.present, "a baseline", "baseline: NoBaseline"),
        (bool(objective.shaper.title), "a shaper", "shaper: NoShape"),
        (bool(objective.route.title), "a route", "route: Vanilla"),
        (isinstance(objective.credit, GAE), "GAE", "credit: ReturnToGo"),
    ):
        if used and not on_token:
            return f"{what} only acts on sampled tokens; exact sums have no sampling noise", line
    if not isinstance(objective.correction, TokenRatio) and not objective.needs_sampler:
        return "a correction weighs sampled tokens, and this objective has none", "correction: TokenRatio"
    if not objective.needs_sampler and any(isinstance(gate, PositionImportance) for gate in objective.gates):
        return "PositionImportance follows the advantages of sampled tokens, and this objective has none", "gates: []"
    return None


def _biases(objective: Objective) -> tuple[str, ...]:
    support, credit, reduction = objective.support, objective.credit, objective.reduction
    out = []
    if isinstance(support, TopK):
        out.append(
            {
                "tail": "a lower bound of the full divergence, off by at most what the tail hides (tail mass)",
                "renormalize": "blind to how much mass lies outside the support",
                "renormalize_teacher": "pulls all mass onto the support",
                "stop_gradient": "what lies outside the support is not compared",
                "sampled_tail": "",
                "raw": "descends the student's mass on the support",
            }[support.closure]
        )
    out.append("" if _time_discounted(objective) else credit.bias)
    if isinstance(reduction, SequenceMean) and (support.sampled or not support.needs_teacher or credit.gamma > 0.0):
        out.append("the weight 1 / length depends on the drawn tokens where completions can end early")
    if isinstance(reduction, TokenMean):
        out.append("divided by the sampled number of tokens (a ratio estimate, bias of order 1 / batch)")
    if objective.shaper.title:
        out.append("the signal is bent: the same fixed point, not the gradient of the divergence")
    out.append(bias_of_route(objective))
    if objective.gates and not _time_discounted(objective):
        out.append(_bias_of_gates(objective))
    return tuple(bias for bias in out if bias)


def bias_of_route(objective: Objective) -> str:
    """Empty for none. Balanced canonical routing is without bias where the routed signal is the exact local advantage."""
    exact = isinstance(objective.baseline, ClosedFormBaseline) or isinstance(objective.credit, GAE)
    if objective.route.bias or not objective.route.balanced:
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
    if isinstance(support, TopK):
        title = {
            "tail": f"{title} of the top-k-plus-tail coarsening",
            "renormalize": f"{title} of both laws renormalised on the top-k",
            "renormalize_teacher": f"{title} from the teacher renormalised on the top-k",
            "stop_gradient": f"generalised {title} on the top-k",
            "sampled_tail": title,
            "raw": f"truncated {title}",
        }[support.closure]
    level = f"time-discounted (gamma={credit.gamma:g}) sequence-level" if _time_discounted(objective) else credit.level
    name = f"{title} from the writer of the text" if isinstance(support, WrittenToken) else f"{level} {title}"
    parts = [support.title, f"{credit.title} credit", objective.baseline.title, objective.shaper.title]
    parts += [gate.title for gate in objective.gates]
    parts += [objective.route.title, objective.reduction.title]
    if objective.needs_sampler and not isinstance(objective.correction, TokenRatio):
        parts.append(objective.correction.title)
    if objective.temperature != 1.0:
        parts.append(f"both laws at temperature {objective.temperature:g}")
    problem = defect_of(objective)
    return DeclaredTarget(
        name="none" if problem else name,
        parts=tuple(part for part in parts if part),
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
    for part, rows in objective.flat():
        own, foreign = student_writes and rows != "others", others_write and rows != "student"
        if not own and not foreign:
            raise DegenerateObjective(
                f"a term learns from {'the student' if rows == 'student' else 'other writers'} alone, who write nothing here.\n"
                "  Write instead: rollout.source: MixtureSource, or leave the term out"
            )
        _refuse_unfit_source(part, own, foreign, steps_per_refresh)


def _refuse_unfit_source(objective: Objective, student_writes: bool, others_write: bool, steps_per_refresh: int) -> None:
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
    if gamma > 0.0 and steps_per_refresh > 1 and isinstance(objective.correction, TokenRatio):
        raise DegenerateObjective(
            f"credit {objective.credit.title} needs completions of the current student, but a refresh serves "
            f"{steps_per_refresh} optimizer steps.\n"
            "  Write instead: rollout.every_n_steps: 1 and rollout.passes: 1, or credit: Immediate, or name a correction: "
            "PrefixProduct (exact, noisy), PPOClip, TruncatedRatio"
        )
    if objective.needs_sampler and steps_per_refresh > 1 and isinstance(objective.correction, NoCorrection):
        raise DegenerateObjective(
            f"NoCorrection takes every token for the student's own, but a refresh serves {steps_per_refresh} optimizer steps.\n"
            "  Write instead: correction: TokenRatio (or PPOClip, TruncatedRatio), or rollout.every_n_steps: 1"
        )
