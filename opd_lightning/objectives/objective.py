"""The whole scalar: one choice on every axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.baselines import Baseline, NoBaseline
from opd_lightning.objectives.corrections import Correction, TokenRatio
from opd_lightning.objectives.credits import GAE, Credit, Immediate, Signals
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.gates import Gate, View
from opd_lightning.objectives.reductions import Reduction, TokenMean
from opd_lightning.objectives.routes import Route, Vanilla
from opd_lightning.objectives.shapers import NoShape, Shaper
from opd_lightning.objectives.supports import FullVocab, Scores, Support
from opd_lightning.objectives.targets import Target, TeacherLaw
from opd_lightning.objectives.validate import DeclaredTarget, declare, refuse_if_degenerate
from opd_lightning.ops import logprobs as lp
from opd_lightning.ops.agreement import agreement
from opd_lightning.ops.estimators import k1, k3
from opd_lightning.ops.masks import unflatten_completions
from opd_lightning.types import ObjectiveOutput, Rollout, TokenLaws, TokenStats

CHUNK_ELEMENTS = 2**24
"""Logits that one chunk of tokens may hold: 64 MiB in float32. Longer batches are scored chunk by chunk, recomputing the
head in the backward pass, so memory does not grow with the number of tokens."""


LARGEST_COST = 1e4
"""What a critic is asked to predict at most, in nats: its squared error must stay finite in float32."""


@dataclass(frozen=True)
class Extras:
    """What some axes need beside the two models.

    Attributes:
        reference: laws of `model.reference`, for targets that need it.
        critic: (N,) predicted minus future cost of every state, differentiable; for `GAE`.
        progress: share of the run that is done, in [0, 1].
    """

    reference: TokenLaws | None = None
    critic: Tensor | None = None
    progress: float = 0.0


class Objective(Configurable):
    """A distillation objective, composed of one choice per axis.

    With d the divergence at a token's support, A the advantage of the drawn token (its own signal, shaped, minus the baseline,
    minus the credited cost of what follows), w the correction's weight, p(a) the student's probability of the drawn token and
    g the product of the gates::

        token_loss_t = g_t * (d_t - w_t A_t log p(a_t))          (A, w, g detached; a route changes the second term)
        loss         = sum_t weight_t * token_loss_t / denominator

    Exact supports have no signal of the drawn token, the sampled token has no d. Gradient flows through d and log p only; the
    teacher receives none.

    Args:
        divergence: what is compared at one vocabulary entry.
        support: which entries are compared.
        target: what the student is compared with.
        credit: which earlier token answers for a divergence.
        baseline: what is subtracted from the signal of sampled tokens.
        shaper: bends the signal of sampled tokens.
        gates: how much a token counts; multiplied.
        route: where probability goes when a sampled token is suppressed.
        correction: weight of sampled tokens that another law has drawn.
        reduction: what the sum is divided by.
        temperature: divides both models' logits before they are compared; no factor T^2 is applied.
        allow_degenerate: train a combination that is refused for a defect, to study it.

    Raises:
        DegenerateObjective: for a combination that optimises nothing, or something else than its name says.
        ValueError: for a temperature that is not positive.
    """

    # One argument per axis: more than ten, because there are more than ten axes.
    def __init__(
        self,
        divergence: Divergence,
        support: Support = FullVocab(),
        credit: Credit = Immediate(),
        baseline: Baseline = NoBaseline(),
        reduction: Reduction = TokenMean(),
        temperature: float = 1.0,
        allow_degenerate: bool = False,
        target: Target = TeacherLaw(),
        gates: list[Gate] | None = None,
        shaper: Shaper = NoShape(),
        route: Route = Vanilla(),
        correction: Correction = TokenRatio(),
    ) -> None:
        if temperature <= 0.0:
            raise ValueError(f"Objective(temperature={temperature}): the temperature must be greater than 0")
        self.divergence, self.support, self.credit = divergence, support, credit
        self.baseline, self.reduction, self.target = baseline, reduction, target
        self.gates, self.shaper, self.route, self.correction = gates or [], shaper, route, correction
        self.temperature, self.allow_degenerate = temperature, allow_degenerate
        refuse_if_degenerate(self)

    @cached_property
    def declared_target(self) -> DeclaredTarget:
        """The gradient that this composition follows, in words."""
        return declare(self)

    @property
    def needs_teacher(self) -> bool:
        return self.support.needs_teacher

    @property
    def needs_reference(self) -> bool:
        return self.target.needs_reference

    @property
    def needs_critic(self) -> bool:
        return self.credit.critic

    @property
    def needs_sampler(self) -> bool:
        """Whether the drawn token enters as a policy gradient, with its recorded sampler log-probability."""
        return self.support.sampled or self.credit.gamma > 0.0

    def denominators(self, rollout: Rollout) -> list[float]:
        """This batch's share of every divisor; shares add up over micro-batches and ranks (see `Rollout.scale`)."""
        return [self.reduction.denominator(rollout.mask)]

    def flat(self) -> list[tuple[Objective, str]]:
        """The objectives that it is a sum of, with whose completions they learn from: ``all``, ``student`` or ``others``."""
        return [(self, "all")]

    def __call__(
        self,
        student: TokenLaws,
        teacher: TokenLaws | None,
        rollout: Rollout,
        agreement_k: int = 0,
        extras: Extras = Extras(),
        rows: Bool[Tensor, " B"] | None = None,
    ) -> ObjectiveOutput:
        """Score one micro-batch.

        Args:
            student: laws at the completion tokens, flattened row by row; gradient flows into them.
            teacher: the same for the teacher, without gradient; None if `needs_teacher` is False.
            rollout: the micro-batch.
            agreement_k: size of the top-k sets compared for the agreement statistics; 0 leaves them out.
            extras: reference laws, critic and progress, where an axis needs them.
            rows: rollouts that count; None counts all.

        Raises:
            ValueError: if sampler log-probabilities are needed and unknown.
        """
        tokens = rollout.text.targets[rollout.mask]
        sampler = rollout.sampler_logprobs[rollout.mask]
        counts = rollout.mask if rows is None else rollout.mask & rows[:, None]
        if self.needs_sampler and bool(sampler[counts[rollout.mask]].isnan().any()):
            raise ValueError(
                f"{self.support.title} with {self.credit.title} credit needs the log-probability with which every token "
                "was sampled, and some rows do not know it (completions from a data set). Use `rollout.source: "
                "StudentSource`, or an exact support (FullVocab, TopK) with credit Immediate."
            )
        parts = self._chunked(student, teacher, tokens, agreement_k, extras)
        sampler = sampler.where(~sampler.isnan(), parts.logprob.detach().to(sampler.dtype))  # rows that do not count
        token_loss = self._token_loss(parts, tokens, sampler, rollout, student.vocab, extras.critic).where(counts, 0.0)
        weights = self.reduction.weights(counts, token_loss.dtype)
        scale = rollout.scale[0] if rollout.scale else 1.0 / max(self.reduction.denominator(counts), 1.0)
        stats = {k: v for k, v in parts.detached.items() if not k.startswith("_")}
        stats["ratio_deviation"] = ((parts.logprob.detach() - rollout.sampler_logprobs[rollout.mask]).exp() - 1.0).abs()
        position = (rollout.mask.cumsum(-1) - 1)[rollout.mask]
        return ObjectiveOutput((token_loss * weights).sum() * scale, token_loss.detach(), TokenStats(position, stats))

    def _token_loss(
        self,
        parts: Parts,
        tokens: Int[Tensor, " N"],
        sampler: Float[Tensor, " N"],
        rollout: Rollout,
        vocab: int,
        critic: Float[Tensor, " N"] | None,
    ) -> Float[Tensor, "B T"]:
        mask, found = rollout.mask, parts.detached
        critic = critic if self.credit.critic else None

        def spread(flat: Tensor) -> Tensor:
            return unflatten_completions(flat, mask)

        loss = spread(parts.direct)
        advantage = torch.zeros_like(loss.detach())
        logprob = spread(parts.logprob)
        if self.needs_sampler:
            values = spread(critic.detach().to(loss.dtype)) if critic is not None else None
            cost, state_cost = spread(found["_cost"]), spread(found["_state_cost"])
            log_ratio = spread(parts.logprob.detach() - sampler.to(logprob.dtype))
            local = spread(found["_reward"])
            if (reach := self.correction.reach(log_ratio, mask)) is not None:
                loss = loss * reach.state
                local, cost, state_cost = local * reach.token, cost * reach.token, state_cost * reach.state
            advantage = self.credit.advantage(Signals(local, cost, state_cost, mask, values))
            weight = self.correction.weight(log_ratio, advantage, mask)
            unit = (logprob - logprob.detach()).exp()  # 1, with the gradient of log p
            if parts.routed is None:
                loss = loss - weight * advantage * unit
            else:
                destination = spread(parts.routed)
                drawn = unit.where(mask, 0.0)
                pulled = (destination - destination.detach()).exp()
                loss = loss - weight * self.route.surrogate(advantage, drawn, pulled, spread(found["_share"]))
        if self.gates:
            seen = {
                k: spread(found.get(k, torch.zeros_like(parts.direct)))
                for k in ("student_entropy", "teacher_entropy", "reverse_kl")
            }
            on_token = spread(parts.logprob.detach()), spread(found["_teacher_logprob"])
            view = View(mask, spread(tokens), *on_token, **seen, advantage=advantage, vocab=vocab)
            for gate in self.gates:
                loss = loss * gate.weight(view).where(mask, 0.0)
        if critic is not None:
            assert isinstance(self.credit, GAE)
            goal = -self.credit.future_cost(spread(found["_state_cost"]), mask).clamp(max=LARGEST_COST)
            loss = loss + 0.5 * (spread(critic.to(loss.dtype)) - goal).square()
        return loss

    def _chunked(
        self,
        student: TokenLaws,
        teacher: TokenLaws | None,
        tokens: Int[Tensor, " N"],
        agreement_k: int,
        extras: Extras,
    ) -> Parts:
        """Everything that needs the vocabulary, with few logits alive at a time."""
        total = len(student)
        size = max(64, CHUNK_ELEMENTS // student.vocab)
        parts = []
        for start in range(0, max(total, 1), size):
            stop = min(start + size, total)

            def score(start: int = start, stop: int = stop) -> Parts:
                theirs = teacher.logits(start, stop) if teacher is not None else None
                third = extras.reference.logits(start, stop) if extras.reference is not None else None
                return self.score(student.logits(start, stop), theirs, tokens[start:stop], agreement_k, third, extras.progress)

            parts.append(_recomputed(score) if total > size else score())
        return Parts.cat(parts)

    def score(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        agreement_k: int = 0,
        reference_logits: Float[Tensor, "N V"] | None = None,
        progress: float = 0.0,
    ) -> Parts:
        """Everything that needs the vocabulary, token by token."""
        student = lp.log_softmax(student_logits, self.temperature)
        logprob = lp.gather(student, tokens)
        if teacher_logits is None:
            scores = self.support.score(self.divergence, student, None, tokens)
            assert scores.direct is not None
            with torch.no_grad():
                nothing = torch.zeros_like(logprob)
                zeros = dict.fromkeys(("_reward", "_cost", "_state_cost", "_teacher_logprob"), nothing)
                return Parts(scores.direct, logprob, None, {"student_entropy": lp.entropy(student), **zeros})
        with torch.no_grad():
            teacher = lp.log_softmax(teacher_logits.detach(), self.temperature)
            third = lp.log_softmax(reference_logits.detach(), self.temperature) if reference_logits is not None else None
            aim = self.target.law(student.detach(), teacher, third, progress).clamp(min=lp.floor_of(student.dtype))
        scores = self.support.score(self.divergence, student, aim, tokens)
        routed = self.route.score(student, aim, tokens)
        direct = scores.direct if scores.direct is not None else torch.zeros_like(logprob)
        with torch.no_grad():
            found = self._signals(scores, student, aim, tokens)
            if routed is not None:
                found["_share"] = routed.share
            found |= _statistics(student, teacher, tokens, agreement_k)
        return Parts(direct, logprob, routed.log_destination if routed is not None else None, found)

    def _signals(self, scores: Scores, student: Tensor, aim: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """What credit is made of: under ``_reward`` the signal of the drawn token, under ``_cost`` what it costs others."""
        on_token = lp.gather(student, tokens), lp.gather(aim, tokens)
        out = {"_teacher_logprob": on_token[1]}
        out["_reward"] = torch.zeros_like(on_token[0])
        out["_cost"] = scores.cost if scores.cost is not None else out["_reward"]
        if scores.reward is not None:
            out["_reward"] = self.shaper.shape(scores.reward, *on_token)
            if self.shaper.title and scores.direct is None:
                out["_cost"] = -self.shaper.shape(-out["_cost"], *on_token)
            if (b := self.baseline.value(self.divergence, student, aim)) is not None:
                out["_reward"] = out["_reward"] - b
        out["_state_cost"] = torch.zeros_like(out["_reward"])
        if self.credit.analytic:
            out["_state_cost"] = self._state_cost(scores, student, aim)
        return out

    def _state_cost(self, scores: Scores, student: Tensor, aim: Tensor) -> Tensor:
        """The mean over tokens of what is under ``_cost``."""
        if scores.direct is not None and not self.support.sampled:
            return scores.direct.detach()
        if self.shaper.title and scores.direct is None:
            return -(student.exp() * self.shaper.shape(-self.divergence.value(student, aim), student, aim)).sum(-1)
        return self.divergence.total(student, aim)


def _statistics(student: Tensor, teacher: Tensor, tokens: Tensor, agreement_k: int) -> dict[str, Tensor]:
    """Measurements of the two models, whatever is descended."""
    on_token = lp.gather(student, tokens), lp.gather(teacher, tokens)
    out = {
        "student_entropy": lp.entropy(student),
        "teacher_entropy": lp.entropy(teacher),
        "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
        "k1": k1(*on_token),
        "k3": k3(*on_token),
    }
    if agreement_k > 0:
        found = agreement(student, teacher, agreement_k)
        out |= {
            "overlap": found.overlap,
            "student_overlap_mass": found.student_mass,
            "teacher_overlap_mass": found.teacher_mass,
            "overlap_advantage": found.advantage,
        }
    return out


class Parts(NamedTuple):
    """What is left of the vocabulary, per token.

    Attributes:
        direct: (N,) differentiated as it stands.
        logprob: (N,) the student's log-probability of the drawn token.
        routed: (N,) log-probability of the route's destination, or None.
        detached: (N,) statistics, and under names with a leading underscore what credit, gates and routes need.
    """

    direct: Tensor
    logprob: Tensor
    routed: Tensor | None
    detached: dict[str, Tensor]

    @classmethod
    def cat(cls, parts: list[Parts]) -> Parts:
        direct, logprob, routed, detached = zip(*parts, strict=True)
        joined = {k: torch.cat([d[k] for d in detached]) for k in detached[0]}
        return cls(torch.cat(direct), torch.cat(logprob), None if routed[0] is None else torch.cat(routed), joined)


def _recomputed(score: Callable[[], Parts]) -> Parts:
    """Run ``score`` now and, for its gradient, once more in the backward pass."""
    result: Parts = checkpoint(score, use_reentrant=False, preserve_rng_state=False)
    return result
