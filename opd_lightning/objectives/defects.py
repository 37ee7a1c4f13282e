"""Combinations that are refused: what is wrong, the formula behind it, and what to write instead.

Each is shown to have its defect in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from opd_lightning.objectives.baselines import RolloutMean
from opd_lightning.objectives.corrections import NoCorrection, PrefixProduct, TokenRatio
from opd_lightning.objectives.credits import GAE, Immediate, TotalReturn
from opd_lightning.objectives.divergences import Divergence, ForwardKL, ReverseKL
from opd_lightning.objectives.gates import PositionImportance
from opd_lightning.objectives.outcomes import MagnitudeOnly
from opd_lightning.objectives.reductions import SequenceMean
from opd_lightning.objectives.supports import MatchedVocab, SampledToken, TopK, WrittenToken
from opd_lightning.objectives.targets import TeacherLaw, TeacherTemperature

if TYPE_CHECKING:
    from opd_lightning.objectives.objective import Objective


class DegenerateObjective(ValueError):
    """A combination that optimises nothing, or something else than its name says."""


class Defect(NamedTuple):
    """Why a combination must not be trained with: in words, as an equation, and what to write instead."""

    cause: str
    formula: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}.\n  Formula: {self.formula}\n  Write instead: {self.remedy}"


def defect_of(objective: Objective) -> Defect | None:
    """What is wrong with a combination, or None."""
    checks = (_of_control, _of_topk, _of_two_vocabularies, _of_text, _of_idle_axis, _of_sampling, _of_route, _of_outcome)
    for check in checks:
        if (found := check(objective)) is not None:
            return found
    return None


def _of_control(objective: Objective) -> Defect | None:
    if objective.replaces_signal and (objective.support.summed or not objective.support.sampled):
        title = type(objective).__name__  # refused even under allow_degenerate: the teacher would still teach
        cause = f"{title} replaces the signal of drawn tokens, and this support has none, or more than that"
        raise DegenerateObjective(str(Defect(cause, "loss_t = -A_t log p(a_t)", "support: SampledToken")))
    if objective.control:
        return Defect(f"a control experiment ({objective.control})", "E[gradient] says nothing of the teacher", "Objective")
    return None


def _of_topk(objective: Objective) -> Defect | None:
    divergence, support = objective.divergence, objective.support
    if not isinstance(support, TopK):
        return None
    if support.closure == "renormalize" and support.k == 1 and support.by != "union":
        return Defect(
            "renormalised on one entry, student and teacher are both 1 there: loss and gradient are exactly 0",
            "p_1 / p_1 = 1 = q_1 / q_1 whatever p is",
            "support.k: 16, or support.closure: tail",
        )
    if support.closure == "renormalize_teacher" and not isinstance(divergence, ForwardKL):
        return Defect(
            "a teacher renormalised on its top-k is 0 elsewhere, where every divergence but the forward KL is infinite or "
            "made of the cut alone",
            "p log(p / q) with q = 0 outside S",
            "divergence: ForwardKL, or support.closure: tail",
        )
    if support.closure in ("raw", "stop_gradient", "sampled_tail") and not divergence.separable:
        return Defect(
            f"the {divergence.title} is not a sum over entries: no part of a law alone has one",
            "D(p, q) != sum_v d(p_v, q_v)",
            "support.closure: tail (or renormalize)",
        )
    if support.closure == "raw":
        return _of_truncation(divergence)
    return None


def _of_two_vocabularies(objective: Objective) -> Defect | None:
    """What needs the drawn token, or a law over the student's whole vocabulary, from a teacher of another one."""
    if not isinstance(objective.support, MatchedVocab):
        return None
    drawn = "the student may draw a token that the teacher does not have: it has no log-probability there"
    missing = "log q(a) does not exist for a outside the shared vocabulary"
    for used, cause, formula, line in (
        (
            not objective.divergence.separable,
            f"the {objective.divergence.title} is not a sum over entries: the shared tokens alone have none",
            "D(p, q) != sum_v d(p_v, q_v)",
            "divergence: {class_path: GeneralizedJSD, init_args: {beta: 0.5}}",
        ),
        (
            not isinstance(objective.target, (TeacherLaw, TeacherTemperature)),
            f"{objective.target.title} mixes two laws entry by entry, and these have different entries",
            "m_v = a p_v + (1 - a) q_v",
            "target: TeacherLaw",
        ),
        (objective.credit.gamma > 0.0, drawn, missing, "credit: Immediate"),
        (any(gate.depends_on != "state" for gate in objective.gates), drawn, missing, "gates: [] (or gates of the state)"),
    ):
        if used:
            return Defect(cause, formula, line)
    return None


def _of_truncation(divergence: Divergence) -> Defect:
    """What a sum of textbook entries over a part of the vocabulary descends besides the divergence."""
    remedy = "support.closure: tail (or renormalize, stop_gradient)"
    if divergence.slope == 0.0:
        cause = f"for a {divergence.title} the raw closure is the stop_gradient closure under another name"
        return Defect(cause, "p f(q / p) with f'(1) = 0 already", "closure: stop_gradient")
    if divergence.slope > 0.0:
        cause = f"a truncated {divergence.title} pulls all mass onto the support, also where student and teacher agree"
        return Defect(cause, f"at p = q: grad sum_S p f(q / p) = - {divergence.slope:g} grad sum_S p", remedy)
    optimum = " (its optimum is p = q / e there)" if isinstance(divergence, ReverseKL) else ""
    cause = (
        f"a truncated {divergence.title} descends the student's own mass on the support{optimum}, also where student and "
        "teacher agree"
    )
    return Defect(cause, f"at p = q: grad sum_S p f(q / p) = {-divergence.slope:g} grad sum_S p", remedy)


def _of_text(objective: Objective) -> Defect | None:
    if not isinstance(objective.support, WrittenToken):
        return None
    if not isinstance(objective.divergence, ForwardKL):
        return Defect(
            f"a written token always descends the likelihood of the text, not a {objective.divergence.title}",
            "E_{y ~ writer} grad -log p(y) = grad KL(writer ‖ p)",
            "divergence: ForwardKL",
        )
    if objective.credit.gamma > 0.0:
        return Defect(
            "a written text is not moved by the student: no token answers for later ones",
            "grad writer(y) = 0",
            "credit: Immediate",
        )
    if not isinstance(objective.target, TeacherLaw):
        return Defect(
            "a written token is its own target; no law is compared with it", "loss_t = - log p(y_t)", "target: TeacherLaw"
        )
    if any(gate.needs_teacher for gate in objective.gates):
        return Defect(
            "a written token has no teacher's law that a gate could look at",
            "loss_t = - log p(y_t)",
            "gates: [] (or gates of position)",
        )
    return None


def _of_idle_axis(objective: Objective) -> Defect | None:
    """Choices that would silently do nothing."""
    on_token = isinstance(objective.support, SampledToken)
    nothing = "sum_v p_v b grad log p_v = b grad 1 = 0"
    for used, what, line in (
        (objective.baseline.present, "a baseline", "baseline: NoBaseline"),
        (bool(objective.shaper.title), "a shaper", "shaper: NoShape"),
        (bool(objective.route.title), "a route", "route: Vanilla"),
        (isinstance(objective.credit, GAE), "GAE", "credit: ReturnToGo"),
    ):
        if used and not on_token:
            return Defect(f"{what} only acts on sampled tokens; exact sums have no sampling noise", nothing, line)
    if not isinstance(objective.correction, TokenRatio) and not objective.needs_sampler:
        cause = "a correction weighs sampled tokens, and this objective has none"
        return Defect(cause, "grad loss_t = grad d_t, whoever drew the token", "correction: TokenRatio")
    if not objective.needs_sampler and any(isinstance(gate, PositionImportance) for gate in objective.gates):
        cause = "PositionImportance follows the advantages of sampled tokens, and this objective has none"
        return Defect(cause, "w_t = 1 + s (1 - sum_{i<t} |A_i| / sum_i |A_i|) with A = 0", "gates: []")
    return None


def _of_sampling(objective: Objective) -> Defect | None:
    """Sampled tokens that are unbounded or biased by themselves."""
    divergence, support, credit = objective.divergence, objective.support, objective.credit
    if support.sampled and not divergence.separable:
        return Defect(
            f"the {divergence.title} couples all entries: a single token has no advantage",
            "D(p, q) != sum_v d(p_v, q_v)",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, closure: tail}}",
        )
    if support.sampled and divergence.heavy_tailed:
        return Defect(
            f"the {divergence.title} on a token that the student sampled grows with the importance weight q / p: its "
            "variance has no bound",
            "E_{y ~ p} (q / p)^2 = sum_v q_v^2 / p_v",
            "support: FullVocab, or support: {class_path: TopK, init_args: {k: 16, by: teacher}}",
        )
    if isinstance(credit, GAE) and objective.baseline.present:
        return Defect(
            "GAE subtracts its own value; a second baseline would count the state twice",
            "A_t = r_t - V(s_t) + ...",
            "baseline: NoBaseline",
        )
    if (objective.baseline.present or isinstance(credit, GAE)) and isinstance(objective.reduction, SequenceMean):
        return Defect(
            "with the sequence mean a token's weight 1 / length depends on what was sampled, so a baseline (GAE's value is "
            "one) changes the expected gradient",
            "E[b(s_t) / |y| grad log p(y_t)] != 0, because |y| depends on y_t",
            "reduction: TokenMean, or baseline: NoBaseline",
        )
    if isinstance(objective.correction, PrefixProduct) and isinstance(credit, (GAE, TotalReturn)):
        return Defect(
            f"{credit.title} gives a token what stands before it or at its own state, which the ratios up to there do not "
            "correct",
            "E_{y ~ old p} prod_{i<=t} (p / old p)_i f(s_k) = E_{y ~ p} f(s_k) for k > t only where the ratios reach k",
            "credit: ReturnToGo, or correction: TokenRatio",
        )
    return None


def _of_route(objective: Objective) -> Defect | None:
    if not objective.route.title:
        return None
    if not isinstance(objective.divergence, ReverseKL):
        return Defect(
            f"routes are derived for the reverse KL, not for the {objective.divergence.title}",
            "c_v = p_v (log q_v - log p_v + KL)_+ / sum",
            "divergence: ReverseKL",
        )
    if isinstance(objective.baseline, RolloutMean) or not (objective.baseline.present or isinstance(objective.credit, GAE)):
        return Defect(
            "without a baseline of its own state a negative signal only says that the student likes a token more than the "
            "teacher does, not that less of it helps: about one routed step in ten then raises the divergence",
            "dKL/dz_a = p_a (log p_a - log q_a - KL): its sign is that of - (r_a + KL), not that of - r_a",
            "baseline: ClosedFormBaseline",
        )
    bare = objective.route.needs_ahead or getattr(objective.route, "space", "logit") == "probability"
    if bare and getattr(objective.support, "k", 0):
        return Defect(
            "look-ahead and probability-space routes name single tokens, and a tail entry stands for many",
            "p_a c_v / p_v moves the mass of one token; Q(s, tail) is no number",
            "support: SampledToken (k: 0), or destination: canonical with space: logit",
        )
    return None


def _of_outcome(objective: Objective) -> Defect | None:
    outcome = objective.outcome
    if not outcome.on_tokens:
        return None
    title, line = type(outcome).__name__, "outcome: NoOutcome, or OutcomeFilter"
    if isinstance(objective.support, WrittenToken):
        cause = f"{title} raises and lowers what the student has drawn, and WrittenToken learns from the text of others"
        return Defect(cause, "grad E_{y ~ p} R(y) = E_{y ~ p} R(y) grad log p(y)", line)
    if objective.route.title:
        cause = f"a route moves mass where the teacher has more of it, and {title} suppresses tokens for another reason"
        return Defect(cause, "c_v = p_v (log q_v - log p_v + KL)_+ / sum", "route: Vanilla")
    if isinstance(objective.correction, PrefixProduct):
        cause = f"{title} grades the whole completion, and the ratios up to a token do not correct for what follows it"
        return Defect(cause, "E_{y ~ old p} prod_{i<=t} (p / old p)_i R(y) != E_{y ~ p} R(y)", "correction: PPOClip")
    if not outcome.replaces:
        return None
    if objective.support.summed or not objective.support.sampled:
        cause = f"{title} shapes the signals of drawn tokens, and this support has none, or more than that"
        return Defect(cause, "loss_t = -A_t log p(a_t)", "support: SampledToken, or outcome: Additive")
    plain = isinstance(objective.credit, Immediate) and not objective.baseline.present
    if isinstance(outcome, MagnitudeOnly) and not (plain and isinstance(objective.divergence, ReverseKL)):
        cause = "MagnitudeOnly takes the ratio of the two models at the drawn token; other signals are no log-ratios"
        return Defect(cause, "exp(sign(R) (log q - log p))", "divergence: ReverseKL, credit: Immediate, baseline: NoBaseline")
    return None


def refuse_unfit_part(objective: Objective, student_writes: bool, others_write: bool, steps_per_refresh: int) -> None:
    """Check a single objective against who writes its completions (see `refuse_unfit_source`)."""
    support, credit, correction = objective.support, objective.credit, objective.correction
    problem = None
    if isinstance(support, WrittenToken) and student_writes:
        problem = Defect(
            "WrittenToken on the student's own completions has expected gradient zero: the student imitates itself",
            "E_{y ~ p} grad log p(y) = sum_y grad p(y) = grad 1 = 0",
            "rollout.source: TeacherSource (or DatasetSource), or support: FullVocab",
        )
    elif credit.gamma > 0.0 and others_write:
        problem = Defect(
            f"credit {credit.title} follows how the student's tokens move its later states, but the source also "
            "hands out completions that the student did not write",
            "grad E_{y ~ p} cost = E_{y ~ p} [grad cost + cost grad log p(y)], y drawn from p",
            "rollout.source: StudentSource, or credit: Immediate",
        )
    elif credit.gamma > 0.0 and steps_per_refresh > 1 and isinstance(correction, TokenRatio):
        problem = Defect(
            f"credit {credit.title} needs completions of the current student, but a refresh serves "
            f"{steps_per_refresh} optimizer steps",
            "grad E_{y ~ p} cost = E_{y ~ p} [grad cost + cost grad log p(y)], y drawn from the p of this step",
            "rollout.every_n_steps: 1 and rollout.passes: 1, or credit: Immediate, or name a correction: PrefixProduct "
            "(exact, noisy), PPOClip, TruncatedRatio",
        )
    elif objective.outcome.on_tokens and others_write:
        problem = Defect(
            f"{type(objective.outcome).__name__} follows how the student's tokens earn their grade, but the source also hands "
            "out completions that the student did not write",
            "grad E_{y ~ p} R(y) = E_{y ~ p} R(y) grad log p(y), y drawn from p",
            "rollout.source: StudentSource, or outcome: OutcomeFilter",
        )
    elif objective.outcome.on_tokens and steps_per_refresh > 1 and isinstance(correction, TokenRatio):
        problem = Defect(
            f"{type(objective.outcome).__name__} grades completions of the current student, but a refresh serves "
            f"{steps_per_refresh} optimizer steps",
            "grad E_{y ~ p} R(y) = E_{y ~ p} R(y) grad log p(y), y drawn from the p of this step",
            "rollout.every_n_steps: 1 and rollout.passes: 1, or name a correction: PPOClip, TruncatedRatio",
        )
    elif objective.needs_sampler and steps_per_refresh > 1 and isinstance(correction, NoCorrection):
        problem = Defect(
            f"NoCorrection takes every token for the student's own, but a refresh serves {steps_per_refresh} optimizer steps",
            "E_{y ~ old p} A grad log p(y) != E_{y ~ p} A grad log p(y)",
            "correction: TokenRatio (or PPOClip, TruncatedRatio), or rollout.every_n_steps: 1",
        )
    elif objective.route.needs_ahead:
        problem = Defect(
            "a look-ahead route needs what follows every candidate token: one more step of both models a candidate, which a "
            "run does not take (enumerable worlds do: see opd_lightning.inspect.oracle)",
            "c_v = p_v (Q(s, v) - V(s))_+ / sum",
            "route.destination: canonical",
        )
    if problem is not None:
        raise DegenerateObjective(str(problem))
