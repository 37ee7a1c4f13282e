"""Control experiments: objectives whose teacher, or whose signal, says nothing about the state.

What a run gains under one of them, it does not owe to the teacher. Each declares ``none`` and needs ``allow_degenerate: true``.
(The identity teacher needs no class: `LiveTeacher` without a context of its own is the student, and the gradient of every
divergence between the two is 0.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.objectives.objective import Objective, TokenLosses
from opd_lightning.objectives.rows import Extras, Parts
from opd_lightning.seeds import fold, run_seed
from opd_lightning.types import ObjectiveOutput, Rollout, TokenLaws

__all__ = ["ConstantNegative", "RandomReward", "ShuffledTeacher"]


@dataclass(frozen=True)
class ShiftedLaws:
    """The laws of other tokens: token n is answered by token n + shift, around the end. See `opd_lightning.types.TokenLaws`."""

    laws: TokenLaws
    shift: int

    def __len__(self) -> int:
        return len(self.laws)

    @property
    def vocab(self) -> int:
        return self.laws.vocab

    def logits(self, start: int, stop: int) -> Tensor:
        size = len(self.laws)
        first, last = start + self.shift, stop + self.shift
        parts = [(first, min(last, size)), (max(first, size) - size, last - size)]
        return torch.cat([self.laws.logits(a, b) for a, b in parts if b > a])


class ShuffledTeacher(Objective):
    """The objective with the teacher's laws shifted along the tokens of a micro-batch: real laws, at the wrong states.

    The shift is drawn anew for every micro-batch, a function of the run's seed and of the rollouts in it. A micro-batch of one
    token cannot be shifted.
    """

    control = "shuffled teacher: every token is compared with the teacher's law at another one"

    def __call__(
        self,
        student: TokenLaws,
        teacher: TokenLaws | None,
        rollout: Rollout,
        agreement_k: int = 0,
        extras: Extras = Extras(),
        rows: Bool[Tensor, " B"] | None = None,
    ) -> ObjectiveOutput:
        if teacher is not None and len(teacher) > 1:
            drawn = fold(run_seed(None), "shuffled teacher", *rollout.row.tolist(), *rollout.policy_step.tolist())
            teacher = ShiftedLaws(teacher, 1 + drawn % (len(teacher) - 1))
        return super().__call__(student, teacher, rollout, agreement_k, extras, rows)


class WithoutSignal(Objective, ABC):
    """The policy gradient with another signal in the place of the teacher's. Needs ``support: SampledToken``."""

    replaces_signal = True

    @abstractmethod
    def signal(self, rollout: Rollout) -> Float[Tensor, " N"]:
        """What stands in its place, for every completion token."""

    def _token_losses(
        self,
        parts: Parts,
        sampler: Float[Tensor, " N"],
        rollout: Rollout,
        vocab: int,
        extras: Extras,
        counts: Bool[Tensor, "B T"],
    ) -> TokenLosses:
        signal = self.signal(rollout).to(parts.logprob)
        other: dict[str, Any] = {"reward": signal, "cost": -signal, "state_cost": -signal}
        return super()._token_losses(parts._replace(detached=parts.detached | other), sampler, rollout, vocab, extras, counts)


class ConstantNegative(WithoutSignal):
    """Every drawn token has the advantage -1. With `Immediate` credit the expected gradient is 0: ``E[-grad log p] = 0``; what
    moves the student is noise, and the pressure of -1 on whatever it has drawn.
    """

    control = "constant negative advantage: -1 for every drawn token"

    def signal(self, rollout: Rollout) -> Tensor:
        return torch.full((int(rollout.mask.sum()),), -1.0, device=rollout.mask.device)


class RandomReward(WithoutSignal):
    """Every drawn token has a standard normal advantage that depends on the run's seed, its rollout and its position alone."""

    control = "random reward: standard normal noise for every drawn token"

    def signal(self, rollout: Rollout) -> Tensor:
        lengths = rollout.mask.sum(-1).tolist()
        seeds = [fold(run_seed(None), "random reward", row) for row in rollout.row.tolist()]
        noise = [torch.randn(n, generator=torch.Generator().manual_seed(s)) for n, s in zip(lengths, seeds, strict=True)]
        return torch.cat(noise).to(rollout.mask.device)
