"""What is subtracted from a sampled token's advantage: a function of its state, of other rollouts, or of earlier steps.

The token's own draw is in none of them, so ``E[b grad log p(y_t)] = b grad 1 = 0``: the expected gradient of the sum over
tokens stays what it is, only its variance changes. (A mean over the sampled number of tokens is a ratio estimate with or
without a baseline; `TokenMean` declares it.) The learned baseline is the critic of `GAE`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.divergences import Divergence

__all__ = ["Baseline", "BatchMean", "ClosedFormBaseline", "GroupMean", "NoBaseline", "TopKBaseline"]


class Baseline(Configurable, ABC):
    """A number per token that the token's own draw has no part in.

    Attributes:
        title: what `declared_target` prints; empty for none.
        needs_groups: all rollouts of a prompt must lie in the same micro-batch.
        decay: share of its memory of earlier steps that a step leaves; None for no memory.
    """

    title: str = ""
    needs_groups: bool = False
    decay: float | None = None

    @property
    def present(self) -> bool:
        return bool(self.title)

    @abstractmethod
    def value(
        self, divergence: Divergence, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
    ) -> Float[Tensor, " N"] | None:
        """The baseline at every token's state, made of the two laws; None if it is not."""


class RolloutMean(Baseline):
    """A baseline made of the advantages of other rollouts."""

    def value(self, divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor | None:
        return None

    @abstractmethod
    def over(
        self,
        advantage: Float[Tensor, "B T"],
        counts: Bool[Tensor, "B T"],
        group: Int[Tensor, " B"],
        past: Float[Tensor, 2] | None,
    ) -> Float[Tensor, "B T"]:
        """The baseline of every token, from advantages without one.

        Args:
            advantage: of the micro-batch.
            counts: tokens that are learnt from.
            group: number of the group that each rollout belongs to.
            past: sum and number of the advantages of earlier steps; None before there are any.
        """


class NoBaseline(Baseline):
    """Subtract nothing."""

    def value(self, divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor | None:
        return None


class ClosedFormBaseline(Baseline):
    """The exact mean of the advantage over the vocabulary; for the reverse KL it is -KL(student ‖ teacher) (vOPD,
    arXiv 2605.07865). It needs the teacher's full law. It does not always lower the variance: log both.
    """

    title = "closed-form baseline"

    def value(self, divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor | None:
        return (student.exp() * divergence.advantage(student, teacher)).sum(-1)


class TopKBaseline(Baseline):
    """The mean of the advantage over the student's k likeliest tokens, both laws renormalised there: the top-k form of vOPD.
    Still a function of the state alone, so still without bias.

    Args:
        k: tokens, at least 2.

    Raises:
        ValueError: for k < 2 (renormalised on one token it is 0).
    """

    def __init__(self, k: int = 16) -> None:
        if k < 2:
            raise ValueError(f"TopKBaseline(k={k}): must be at least 2; renormalised on one token the baseline is 0")
        self.k = k
        self.title = f"top-{k} closed-form baseline"

    def value(self, divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor | None:
        ids = student.topk(min(self.k, student.shape[-1]), -1).indices
        s, t = (law.gather(-1, ids).log_softmax(-1) for law in (student, teacher))
        return (s.exp() * divergence.advantage(s, t)).sum(-1)


class GroupMean(RolloutMean):
    """The mean advantage at the same position of the *other* rollouts of the prompt, of those that got there; 0 where none did.

    Rollouts of a prompt are drawn independently, so leaving the own one out leaves no bias, with every credit; counting it in
    would shrink the gradient by its share of the mean. The rollouts of a prompt stay in one micro-batch (the run sees to
    it, or refuses sizes that cut them), so the gradient does not depend on how a step is cut up.
    """

    title = "leave-one-out group mean"
    needs_groups = True

    def over(self, advantage: Tensor, counts: Tensor, group: Tensor, past: Tensor | None) -> Tensor:
        others = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
        weight, there = others.to(advantage.dtype), counts.to(advantage.dtype)
        mean: Tensor = weight @ advantage.where(counts, 0.0) / (weight @ there).clamp(min=1.0)
        return mean


class BatchMean(RolloutMean):
    """The mean advantage of all tokens of *earlier* optimizer steps, later ones weighing more; 0 in the first step.

    It is fixed before the present step draws anything: without bias, and the same however the step is cut up. The checkpoint
    keeps it. (Whitening by the mean of the present batch instead holds the token itself and would scale the gradient down
    by one over the batch.) With `rollout.passes` above 1 the second pass has seen its own rollouts in the first.

    Args:
        decay: share of its memory that one step leaves, in [0, 1); 0 is the mean of the step before.

    Raises:
        ValueError: if decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"BatchMean(decay={decay}): must lie in [0, 1)")
        self.decay = decay
        self.title = f"mean of earlier batches, decay {decay:g}"

    def over(self, advantage: Tensor, counts: Tensor, group: Tensor, past: Tensor | None) -> Tensor:
        total, number = (0.0, 0.0) if past is None else past.tolist()
        return torch.full_like(advantage, total / number if number else 0.0)
