"""The whole scalar: divergence x support x credit x baseline x reduction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.credits import Baseline, Credit, Immediate, NoBaseline
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.reductions import Reduction, TokenMean
from opd_lightning.objectives.supports import FullVocab, Scores, Support
from opd_lightning.objectives.validate import DeclaredTarget, declare, refuse_if_degenerate
from opd_lightning.ops import logprobs as lp
from opd_lightning.ops.agreement import agreement
from opd_lightning.ops.estimators import k1, k3
from opd_lightning.ops.masks import unflatten_completions
from opd_lightning.types import ObjectiveOutput, Rollout, TokenLaws, TokenStats

CHUNK_ELEMENTS = 2**24
"""Logits that one chunk of tokens may hold: 64 MiB in float32. Longer batches are scored chunk by chunk, recomputing the
head in the backward pass, so memory does not grow with the number of tokens."""


class Objective(Configurable):
    """A distillation objective, composed of one choice per axis.

    With d the divergence at a token's support, r the advantage of the sampled token, F the discounted later cost and
    rho = p(token) / p_sampler(token)::

        token_loss_t = d_t + (F_t - r_t + b_t) * rho_t        (detached inside the brackets)
        loss         = sum_t weight_t * token_loss_t / denominator

    Exact supports have no r, the sampled token has no d. Gradient flows through d and rho only; the teacher receives none.

    Args:
        divergence: what is compared at one vocabulary entry.
        support: which entries are compared.
        credit: which earlier token answers for a divergence.
        baseline: what is subtracted from the advantage of sampled tokens.
        reduction: what the sum is divided by.
        temperature: divides both models' logits before they are compared; no factor T^2 is applied.
        allow_degenerate: train a combination that is refused for a defect, to study it.

    Raises:
        DegenerateObjective: for a combination that optimises nothing, or something else than its name says.
        ValueError: for a temperature that is not positive.
    """

    def __init__(
        self,
        divergence: Divergence,
        support: Support = FullVocab(),
        credit: Credit = Immediate(),
        baseline: Baseline = NoBaseline(),
        reduction: Reduction = TokenMean(),
        temperature: float = 1.0,
        allow_degenerate: bool = False,
    ) -> None:
        if temperature <= 0.0:
            raise ValueError(f"Objective(temperature={temperature}): the temperature must be greater than 0")
        self.divergence, self.support, self.credit = divergence, support, credit
        self.baseline, self.reduction = baseline, reduction
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
    def needs_sampler(self) -> bool:
        """Whether the recorded sampler log-probabilities enter the gradient."""
        return self.support.sampled or self.credit.gamma > 0.0

    def __call__(
        self, student: TokenLaws, teacher: TokenLaws | None, rollout: Rollout, agreement_k: int = 0
    ) -> ObjectiveOutput:
        """Score one micro-batch.

        Args:
            student: laws at the completion tokens, flattened row by row; gradient flows into them.
            teacher: the same for the teacher, without gradient; None if `needs_teacher` is False.
            rollout: the micro-batch.
            agreement_k: size of the top-k sets compared for the agreement statistics; 0 leaves them out.

        Raises:
            ValueError: if sampler log-probabilities are needed and unknown.
        """
        tokens = rollout.text.targets[rollout.mask]
        sampler = rollout.sampler_logprobs[rollout.mask]
        if self.needs_sampler and bool(sampler.isnan().any()):
            raise ValueError(
                f"{self.support.title} with {self.credit.title} credit needs the log-probability with which every token "
                "was sampled, and some rows do not know it (completions from a data set). Use `rollout.source: "
                "StudentSource`, or an exact support (FullVocab, TopK) with credit Immediate."
            )
        direct, logprob, detached = self._chunked(student, teacher, tokens, agreement_k)
        per_token = self._token_loss(direct, logprob, detached, sampler, rollout)
        token_loss = unflatten_completions(per_token, rollout.mask)
        weights = self.reduction.weights(rollout.mask, token_loss.dtype)
        scale = rollout.scale or 1.0 / max(self.reduction.denominator(rollout.mask), 1.0)
        stats = {k: v for k, v in detached.items() if not k.startswith("_")}
        stats["ratio_deviation"] = ((logprob.detach() - sampler).exp() - 1.0).abs()
        position = (rollout.mask.cumsum(-1) - 1)[rollout.mask]
        return ObjectiveOutput((token_loss * weights).sum() * scale, token_loss.detach(), TokenStats(position, stats))

    def _token_loss(
        self,
        direct: Float[Tensor, " N"],
        logprob: Float[Tensor, " N"],
        detached: dict[str, Tensor],
        sampler: Float[Tensor, " N"],
        rollout: Rollout,
    ) -> Float[Tensor, " N"]:
        if not self.needs_sampler:
            return direct
        brackets = -detached["_reward"]
        if self.credit.gamma > 0.0:
            cost = unflatten_completions(detached["_cost"], rollout.mask)
            brackets = brackets + self.credit.future(cost, rollout.mask)[rollout.mask]
        rho = (logprob - sampler.to(logprob.dtype)).exp()
        return direct + brackets * rho

    def _chunked(
        self, student: TokenLaws, teacher: TokenLaws | None, tokens: Int[Tensor, " N"], agreement_k: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(direct, logprob, detached values), each (N,), with few logits alive at a time."""
        total = len(student)
        size = max(64, CHUNK_ELEMENTS // student.vocab)
        parts = []
        for start in range(0, max(total, 1), size):
            stop = min(start + size, total)

            def score(start: int = start, stop: int = stop) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                theirs = teacher.logits(start, stop) if teacher is not None else None
                return self.score(student.logits(start, stop), theirs, tokens[start:stop], agreement_k)

            parts.append(_recomputed(score) if total > size else score())
        direct, logprob, detached = zip(*parts, strict=True)
        return torch.cat(direct), torch.cat(logprob), {k: torch.cat([d[k] for d in detached]) for k in detached[0]}

    def score(
        self,
        student_logits: Float[Tensor, "N V"],
        teacher_logits: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        agreement_k: int = 0,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], dict[str, Tensor]]:
        """Everything that needs the vocabulary, token by token.

        Returns:
            The part that is differentiated directly, the student's log-probability of the drawn token, and detached
            values: statistics, and under ``_reward`` and ``_cost`` what the score function is multiplied with.
        """
        student = lp.log_softmax(student_logits, self.temperature)
        teacher = None
        if teacher_logits is not None:
            teacher = lp.log_softmax(teacher_logits.detach(), self.temperature)
        scores = self.support.score(self.divergence, student, teacher, tokens)
        logprob = lp.gather(student, tokens)
        direct = scores.direct if scores.direct is not None else torch.zeros_like(logprob)
        with torch.no_grad():
            detached = self._detached(scores, student, teacher, tokens, agreement_k)
        return direct, logprob, detached

    def _detached(
        self, scores: Scores, student: Tensor, teacher: Tensor | None, tokens: Tensor, agreement_k: int
    ) -> dict[str, Tensor]:
        out = {"student_entropy": lp.entropy(student)}
        if scores.cost is not None:
            out["_cost"] = scores.cost
        out["_reward"] = torch.zeros_like(out["student_entropy"]) if scores.reward is None else scores.reward
        if teacher is None:
            return out
        if scores.reward is not None and (b := self.baseline.value(self.divergence, student, teacher)) is not None:
            out["_reward"] = out["_reward"] - b
        out["teacher_entropy"] = lp.entropy(teacher)
        out["reverse_kl"] = (student.exp() * (student - teacher)).sum(-1)
        on_token = lp.gather(student, tokens), lp.gather(teacher, tokens)
        out |= {"k1": k1(*on_token), "k3": k3(*on_token)}
        if agreement_k > 0:
            found = agreement(student, teacher, agreement_k)
            out |= {
                "overlap": found.overlap,
                "student_overlap_mass": found.student_mass,
                "teacher_overlap_mass": found.teacher_mass,
                "overlap_advantage": found.advantage,
            }
        return out


def _recomputed(score: Callable[[], tuple[Tensor, Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run ``score`` now and, for its gradient, once more in the backward pass."""
    result: tuple[Tensor, Tensor, dict[str, Tensor]] = checkpoint(score, use_reentrant=False, preserve_rng_state=False)
    return result
