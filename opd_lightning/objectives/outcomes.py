"""What the grade of a whole completion adds to the signals of its tokens.

The teacher says how a token compares with its own choice, the grader whether the completion is right. An outcome joins the
two. Grades are numbers in [0, 1], one a rollout (`Rollout.outcome`), given when the text is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = ["Additive", "Bounded", "MagnitudeOnly", "NoOutcome", "Outcome", "OutcomeFilter"]

RIGHT = 0.5
"""A completion counts as right from this grade on."""


class Outcome(Configurable, ABC):
    """How grades enter.

    Attributes:
        title: what `declared_target` prints; empty for none.
        bias: what separates the expected gradient from that of the declared name; empty if nothing.
        on_tokens: it changes the advantages of drawn tokens.
        needs_groups: a completion is compared with the others of its prompt.
        replaces: what is left of the divergence is a matter of magnitude: the name of the target is its own.
    """

    title: str = ""
    bias: str = ""
    on_tokens: bool = False
    needs_groups: bool = False
    replaces: bool = False

    def rows(self, outcome: Float[Tensor, " B"]) -> Bool[Tensor, " B"] | None:
        """Rollouts that are learnt from; None for all."""
        return None

    @abstractmethod
    def combine(
        self,
        advantage: Float[Tensor, "B T"],
        counts: Bool[Tensor, "B T"],
        outcome: Float[Tensor, " B"],
        group: Int[Tensor, " B"],
        progress: float,
    ) -> Float[Tensor, "B T"]:
        """The advantages to use.

        Args:
            advantage: of the divergence, credited.
            counts: tokens that are learnt from.
            outcome: grades.
            group: number of the group that each rollout belongs to.
            progress: share of the run that is done.
        """

    def named(self, divergence: str) -> str:
        """The declared target, from that of the divergence alone."""
        return f"expected grade, magnitudes shaped by the {divergence}" if self.replaces else divergence


class NoOutcome(Outcome):
    """Nobody is graded: distillation alone."""

    def combine(self, advantage: Tensor, counts: Tensor, outcome: Tensor, group: Tensor, progress: float) -> Tensor:
        return advantage


class Additive(Outcome):
    """``A_t + weight (R - mean of the R of the prompt's other rollouts)``, R the grade: distillation and reinforcement summed.

    The expected gradient is that of ``E D - weight E R``, exactly: the other rollouts are drawn independently of this one. With
    an exact support the divergence is summed over the vocabulary and the grade alone is a policy gradient (a joint loss).

    Args:
        weight: of the grades; greater than 0.
        grouped: subtract the mean of the prompt's other rollouts; false subtracts nothing, with more noise.

    Raises:
        ValueError: for a weight that is not positive.
    """

    on_tokens = True

    def __init__(self, weight: float = 1.0, grouped: bool = True) -> None:
        if weight <= 0.0:
            raise ValueError(f"Additive(weight={weight}): must be greater than 0; NoOutcome leaves the grades out")
        self.weight, self.needs_groups = weight, grouped
        self.title = f"grades added, weight {weight:g}" + (", less the leave-one-out group mean" if grouped else "")

    def combine(self, advantage: Tensor, counts: Tensor, outcome: Tensor, group: Tensor, progress: float) -> Tensor:
        task = _against_group(outcome, group) if self.needs_groups else outcome
        return advantage + self.weight * task[:, None].to(advantage.dtype)

    def named(self, divergence: str) -> str:
        return f"{divergence} - {self.weight:g} x expected grade"


class Bounded(Outcome):
    """``A_t / (mean_k |A_k| + |A_t|) + R`` with R = 1 for a right completion and -1 for a wrong one (RBM of gammaOPD).

    The first part lies strictly between -1 and 1, so every token of a right completion is raised and every token of a wrong one
    lowered; the teacher says how much. The mean is over the completion's own tokens.
    """

    on_tokens = True
    title = "bounded, signed by the grade"
    bias = "advantages are bounded by their mean over the drawn completion and shifted by its grade: the gradient of no scalar"
    replaces = True

    def combine(self, advantage: Tensor, counts: Tensor, outcome: Tensor, group: Tensor, progress: float) -> Tensor:
        size = advantage.abs().where(counts, 0.0)
        mean = size.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
        total = mean + size
        bounded = advantage / total.where(total > 0.0, 1.0)  # 0 / 0 where the models agree everywhere
        return bounded + (2.0 * (outcome >= RIGHT).to(advantage.dtype) - 1.0)[:, None]


class MagnitudeOnly(Outcome):
    """``R' ((1 - m) + m clip(exp(sign(R') A_t), 1 - bound, 1 + bound))`` (RLSD, arXiv 2604.03128).

    R' is the grade less the mean of the prompt's other rollouts, A_t the log-ratio of teacher and student. The factor is
    positive: the teacher cannot turn a direction, which closes the door to what only it was told. A group with equal
    grades teaches nothing.

    Args:
        mix: m at the first step, in [0, 1].
        final_mix: m from ``until`` on, reached linearly; null keeps ``mix``.
        bound: largest relative change, in (0, 1).
        until: share of the run after which ``final_mix`` holds, in (0, 1].

    Raises:
        ValueError: for numbers outside their interval.
    """

    on_tokens = True
    needs_groups = True
    replaces = True
    title = "magnitudes shaped by the teacher"
    bias = "factors depend on the drawn token: not the gradient of the expected grade, though no token's direction changes"

    def __init__(self, mix: float = 0.5, final_mix: float | None = None, bound: float = 0.2, until: float = 1.0) -> None:
        last = mix if final_mix is None else final_mix
        if not (0.0 <= mix <= 1.0 and 0.0 <= last <= 1.0 and 0.0 < bound < 1.0 and 0.0 < until <= 1.0):
            raise ValueError(
                f"MagnitudeOnly(mix={mix}, final_mix={final_mix}, bound={bound}, until={until}): mixes lie in [0, 1], bound in "
                "(0, 1), until in (0, 1]"
            )
        self.mix, self.final_mix, self.bound, self.until = mix, last, bound, until

    def combine(self, advantage: Tensor, counts: Tensor, outcome: Tensor, group: Tensor, progress: float) -> Tensor:
        mix = self.mix + (self.final_mix - self.mix) * min(progress / self.until, 1.0)
        task = _against_group(outcome, group)[:, None].to(advantage.dtype)
        factor = (task.sign() * advantage).exp().clamp(1.0 - self.bound, 1.0 + self.bound)
        return task * (1.0 - mix + mix * factor)


Keep = Literal["right", "wrong"]


class OutcomeFilter(Outcome):
    """Learn from the right completions alone, or from the wrong ones: ``E[loss | right]``, divided by what was kept.

    It chooses completions; it does not say which of their tokens were at fault.

    Args:
        keep: ``right`` or ``wrong``.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, keep: Keep = "right") -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"OutcomeFilter(keep={keep!r}): allowed are {', '.join(get_args(Keep))}")
        self.keep = keep
        self.title = f"{keep} completions alone"
        self.bias = f"the mean over {keep} completions, whose chance the gradient does not see"

    def rows(self, outcome: Tensor) -> Tensor:
        return (outcome >= RIGHT) == (self.keep == "right")

    def combine(self, advantage: Tensor, counts: Tensor, outcome: Tensor, group: Tensor, progress: float) -> Tensor:
        return advantage


def _against_group(outcome: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Each grade less the mean of the others of its group; less 0 where there are none."""
    others = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    weight = others.to(outcome.dtype)
    return outcome - weight @ outcome / weight.sum(-1).clamp(min=1.0)
