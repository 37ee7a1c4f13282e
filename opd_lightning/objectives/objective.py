"""The whole scalar: one choice on every axis."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.baselines import Baseline, NoBaseline, RolloutMean
from opd_lightning.objectives.corrections import Correction, TokenRatio
from opd_lightning.objectives.credits import GAE, Credit, Immediate, Signals
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.gates import Gate, View
from opd_lightning.objectives.outcomes import NoOutcome, Outcome
from opd_lightning.objectives.reductions import Reduction, TokenMean
from opd_lightning.objectives.routes import Route, Vanilla
from opd_lightning.objectives.rows import Extras, Parts, exactly, measure
from opd_lightning.objectives.shapers import NoShape, Shaper
from opd_lightning.objectives.supports import FullVocab, Support
from opd_lightning.objectives.targets import Target, TeacherLaw
from opd_lightning.objectives.validate import DeclaredTarget, declare, refuse_if_degenerate
from opd_lightning.ops.masks import unflatten_completions
from opd_lightning.types import TOP, ObjectiveOutput, Rollout, TokenLaws, TokenStats

LARGEST_COST = 1e4
"""What a critic is asked to predict at most, in nats: its squared error must stay finite in float32."""


class TokenLosses(NamedTuple):
    """What the tokens of a micro-batch contribute.

    Attributes:
        loss: (B, T) before reduction.
        critic: (B, T) squared error of the critic; None without one.
        advantage: (B, T) of the drawn token, detached; None where it does not enter.
        advantages: (1, 2) their sum and number before the baseline, detached; None where no baseline remembers them.
    """

    loss: Tensor
    critic: Tensor | None
    advantage: Tensor | None
    advantages: Tensor | None


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
        outcome: what the grade of the whole completion adds.
        reduction: what the sum is divided by.
        temperature: divides both models' logits before they are compared; no factor T^2 is applied.
        allow_degenerate: train a combination that is refused for a defect, to study it.

    Raises:
        DegenerateObjective: for a combination that optimises nothing, or something else than its name says.
        ValueError: for a temperature that is not positive.
    """

    control: str = ""
    """What a control experiment puts in the teacher's place; see `opd_lightning.objectives.controls`."""
    replaces_signal: bool = False
    """Whether the signal of drawn tokens is not the teacher's."""

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
        outcome: Outcome = NoOutcome(),
    ) -> None:
        if temperature <= 0.0:
            raise ValueError(f"Objective(temperature={temperature}): the temperature must be greater than 0")
        self.divergence, self.support, self.credit = divergence, support, credit
        self.baseline, self.reduction, self.target = baseline, reduction, target
        self.gates, self.shaper, self.route, self.correction = gates or [], shaper, route, correction
        self.temperature, self.allow_degenerate, self.outcome = temperature, allow_degenerate, outcome
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
    def needs_groups(self) -> bool:
        """Whether the rollouts of a prompt must lie in one micro-batch."""
        return self.baseline.needs_groups or self.outcome.needs_groups

    @property
    def needs_outcome(self) -> bool:
        """Whether completions must be graded."""
        return any(part.outcome.title for part, _ in self.flat())

    @property
    def record_top_k(self) -> int:
        """How many of the student's likeliest tokens must be recorded with every token that is written."""
        return max(part.support.record_top_k for part, _ in self.flat())

    @property
    def needs_sampler(self) -> bool:
        """Whether the drawn token enters as a policy gradient, with its recorded sampler log-probability."""
        return self.support.sampled or self.credit.gamma > 0.0 or self.outcome.on_tokens

    def denominators(self, rollout: Rollout) -> list[float]:
        """This batch's share of every divisor; shares add up over micro-batches and ranks (see `Rollout.scale`)."""
        return [self.reduction.denominator(self.counted(rollout))]

    def flat(self) -> list[tuple[Objective, str]]:
        """The objectives that it is a sum of, with whose completions they learn from: ``all``, ``student`` or ``others``."""
        return [(self, "all")]

    def remember(self, past: Float[Tensor, "K 2"] | None, seen: Float[Tensor, "K 2"]) -> Float[Tensor, "K 2"]:
        """What baselines keep after an optimizer step in which ``seen`` was added: one row a term."""
        if past is None:
            return seen
        decays = [part.baseline.decay or 0.0 for part, _ in self.flat()]
        return torch.tensor(decays, dtype=past.dtype)[:, None] * past + seen

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
            extras: what some axes need beside the two models.
            rows: rollouts that count; None counts all.

        Raises:
            ValueError: if sampler log-probabilities are needed and unknown.
        """
        self.check(rollout, rows)
        tokens = rollout.text.targets[rollout.mask]
        expected = self.expected_gradient(rollout, rows)
        extras = self.recorded(rollout, extras)
        parts, stats = measure([self], student, teacher, tokens, agreement_k, extras, [expected])
        return self.conclude(parts[0], stats, rollout, rows, student.vocab, extras)

    def counted(self, rollout: Rollout, rows: Bool[Tensor, " B"] | None = None) -> Bool[Tensor, "B T"]:
        """Tokens that it learns from.

        Args:
            rollout: graded where the outcome asks for it.
            rows: rollouts that count; None counts all.

        Raises:
            ValueError: if grades are needed and unknown.
        """
        counts = rollout.mask if rows is None else rollout.mask & rows[:, None]
        if not self.outcome.title:
            return counts
        if rollout.outcome is None:
            raise ValueError(
                f"{self.outcome!r} needs the grade of every completion (Rollout.outcome), as RolloutRefresh records it where "
                "the prompt set has a grader; for rollouts from elsewhere give grades in [0, 1], or use `outcome: NoOutcome`"
            )
        kept = self.outcome.rows(rollout.outcome)
        return counts if kept is None else counts & kept[:, None]

    def check(self, rollout: Rollout, rows: Bool[Tensor, " B"] | None = None) -> None:
        """Refuse a rollout that lacks what this objective needs.

        Raises:
            ValueError: if sampler log-probabilities are needed and unknown.
        """
        if self.needs_sampler and bool(rollout.sampler_logprobs[self.counted(rollout, rows)].isnan().any()):
            raise ValueError(
                f"{self.support.title} with {self.credit.title} credit needs the log-probability with which every token "
                "was sampled, and some rows do not know it (completions from a data set). Use `rollout.source: "
                "StudentSource`, or an exact support (FullVocab, TopK) with credit Immediate."
            )

    def recorded(self, rollout: Rollout, extras: Extras) -> Extras:
        """The same with what was recorded when the text was written.

        Raises:
            ValueError: if an objective stands on it and it is not there.
        """
        if not self.record_top_k:
            return extras
        if rollout.top_ids is None:
            raise ValueError(
                "TopK(ids='sampling') needs the student's likeliest tokens recorded with the rollout, as RolloutRefresh does; "
                "for rollouts from elsewhere use support.ids: scoring"
            )
        return replace(extras, top_ids=rollout.top_ids[rollout.mask])

    def expected_gradient(self, rollout: Rollout, rows: Bool[Tensor, " B"] | None = None) -> Float[Tensor, " N"] | None:
        """What the loss will give to each token's divergence, where that follows from the reduction alone."""
        if self.gates or self.needs_sampler:
            return None
        return self._weights(rollout, rows, torch.float64)[rollout.mask]

    def _weights(self, rollout: Rollout, rows: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "B T"]:
        """The factor of every token's loss; 0 where it does not count."""
        counts = self.counted(rollout, rows)
        scale = rollout.scale[0] if rollout.scale else 1.0 / max(self.reduction.denominator(counts), 1.0)
        return (self.reduction.weights(counts, dtype) * scale).where(counts, 0.0)

    def conclude(
        self,
        parts: Parts,
        stats: dict[str, Tensor],
        rollout: Rollout,
        rows: Bool[Tensor, " B"] | None,
        vocab: int,
        extras: Extras,
    ) -> ObjectiveOutput:
        """The loss, from what `measure` has left of the vocabulary.

        Args:
            parts: this objective's.
            stats: (N,) measurements that are passed on.
            rollout: the micro-batch.
            rows: rollouts that count; None counts all.
            vocab: entries of the vocabulary.
            extras: the critic's predictions, and one row of what is remembered.
        """
        sampler = rollout.sampler_logprobs[rollout.mask]
        drawn = parts.logprob.detach()
        ratio = (drawn - sampler).exp()
        likeliest = {k.removeprefix(TOP): v for k, v in stats.items() if k.startswith(TOP)}
        stats = {k: v for k, v in stats.items() if not k.startswith(TOP)}
        stats |= {"logprob": drawn, "ratio": ratio, "ratio_deviation": (ratio - 1.0).abs()}
        sampler = sampler.where(~sampler.isnan(), drawn.to(sampler.dtype))  # rows that do not count
        counts = self.counted(rollout, rows)
        with exactly(sampler):
            found = self._token_losses(parts, sampler, rollout, vocab, extras, counts)
        total = token_loss = found.loss.where(counts, 0.0)
        if found.critic is not None:
            stats["critic_loss"] = found.critic.detach()[rollout.mask]
            total = total + found.critic.where(counts, 0.0)
        if found.advantage is not None:
            stats["advantage"] = found.advantage[rollout.mask]
        position = (rollout.mask.cumsum(-1) - 1)[rollout.mask]
        loss = (total * self._weights(rollout, rows, total.dtype)).sum()
        return ObjectiveOutput(loss, token_loss.detach(), TokenStats(position, stats, likeliest), found.advantages)

    def _token_losses(
        self,
        parts: Parts,
        sampler: Float[Tensor, " N"],
        rollout: Rollout,
        vocab: int,
        extras: Extras,
        counts: Bool[Tensor, "B T"],
    ) -> TokenLosses:
        mask, found = rollout.mask, parts.detached
        critic, advantages = extras.critic if self.credit.critic else None, None

        def spread(flat: Tensor) -> Tensor:
            return unflatten_completions(flat, mask)

        zero = torch.zeros_like(parts.logprob.detach())
        loss = spread(parts.direct if parts.direct is not None else zero)
        advantage = torch.zeros_like(loss.detach())
        logprob = spread(parts.logprob)
        if self.needs_sampler:
            values = spread(critic.detach().to(loss.dtype)) if critic is not None else None
            cost, state_cost = spread(found["cost"]), spread(found["state_cost"])
            log_ratio = spread(parts.logprob.detach() - sampler.to(logprob.dtype))
            local = spread(found["reward"])
            if isinstance(self.baseline, RolloutMean):
                plain = self.credit.advantage(Signals(local, cost, state_cost, mask, values))
                past = extras.past[0] if extras.past is not None else None
                local = local - self.baseline.over(plain, counts, rollout.group, past)
                if self.baseline.decay is not None:
                    advantages = torch.stack([plain.double().where(counts, 0.0).sum(), counts.sum().double()])[None]
            if (reach := self.correction.reach(log_ratio, mask)) is not None:
                loss = loss * reach.state
                local, cost, state_cost = local * reach.token, cost * reach.token, state_cost * reach.state
            advantage = self.credit.advantage(Signals(local, cost, state_cost, mask, values))
            if rollout.outcome is not None:
                advantage = self.outcome.combine(advantage, counts, rollout.outcome, rollout.group, extras.progress)
            weight = self.correction.weight(log_ratio, advantage, mask)
            unit = (logprob - logprob.detach()).exp()  # 1, with the gradient of log p
            if parts.routed is None:
                loss = loss - weight * advantage * unit
            else:
                destination = spread(parts.routed)
                drawn = unit.where(mask, 0.0)
                pulled = (destination - destination.detach()).exp()
                loss = loss - weight * self.route.surrogate(advantage, drawn, pulled, spread(found["share"]))
        if self.gates:
            seen = {k: spread(found.get(k, zero)) for k in ("student_entropy", "teacher_entropy", "reverse_kl")}
            on_token = spread(parts.logprob.detach()), spread(found["teacher_logprob"])
            view = View(mask, rollout.text.targets.where(mask, 0), *on_token, **seen, advantage=advantage, vocab=vocab)
            for gate in self.gates:
                loss = loss * gate.weight(view).where(mask, 0.0)
        error = None
        if critic is not None:
            assert isinstance(self.credit, GAE)
            goal = -self.credit.future_cost(spread(found["state_cost"]), mask).clamp(max=LARGEST_COST)
            error = 0.5 * (spread(critic.to(loss.dtype)) - goal).square()
        return TokenLosses(loss, error, advantage if self.needs_sampler else None, advantages)
