"""What is subtracted from a sampled token's advantage. It depends on the state alone, so the expected gradient stays what it
is; only its variance changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.divergences import Divergence

__all__ = ["Baseline", "ClosedFormBaseline", "NoBaseline", "TopKBaseline"]


class Baseline(Configurable, ABC):
    """A number per state.

    Attributes:
        title: what `declared_target` prints; empty for none.
    """

    title: str = ""

    @property
    def present(self) -> bool:
        return bool(self.title)

    @abstractmethod
    def value(
        self, divergence: Divergence, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
    ) -> Float[Tensor, " N"] | None:
        """The baseline at every token's state, or None."""


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
