"""Which earlier token answers for a divergence, and what is subtracted before it does.

An on-policy completion moves the states of the tokens after it. The exact gradient of ``E sum_t D(s_t)`` over the student's
own completions therefore has two parts: every ``D`` differentiated where it stands, and every token's score function times
the sum of the D that follow. `Credit.future` is that sum, discounted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.ops.returns import discounted_future

__all__ = ["Baseline", "ClosedFormBaseline", "Credit", "Discounted", "Immediate", "NoBaseline", "ReturnToGo"]


class Credit(Configurable, ABC):
    """Attribution of later costs to earlier tokens.

    Attributes:
        gamma: discount per token of what comes later; 0 looks at nothing but the token itself.
    """

    gamma: float

    def future(self, cost: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """What a token answers for beyond its own divergence; 0 where masked."""
        return discounted_future(cost, mask, self.gamma)

    @property
    @abstractmethod
    def title(self) -> str:
        """What `declared_target` prints."""


class Immediate(Credit):
    """No token answers for later ones: the token-level objective, states held fixed (GKD, OPD; gamma = 0)."""

    gamma = 0.0
    title = "immediate"


class Discounted(Credit):
    """A token answers for the k-th token after it with weight gamma^k.

    For 0 < gamma < 1 the update follows neither the token-level nor the sequence-level objective, and is the gradient of
    no scalar at all.

    Args:
        gamma: in [0, 1]; 0 is `Immediate`, 1 is `ReturnToGo`.

    Raises:
        ValueError: if gamma is outside [0, 1].
    """

    def __init__(self, gamma: float) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"Discounted(gamma={gamma}): gamma must lie in [0, 1]")
        self.gamma = gamma

    @property
    def title(self) -> str:
        return f"discounted, gamma={self.gamma:g}"


class ReturnToGo(Credit):
    """A token answers for everything after it: the exact gradient of the divergence between whole completions."""

    gamma = 1.0
    title = "return-to-go"


class Baseline(Configurable, ABC):
    """A number per state, subtracted from the advantage of the sampled token. It depends on the state alone, so the
    expected gradient stays what it is; only its variance changes.
    """

    present: bool = True

    @abstractmethod
    def value(
        self, divergence: Divergence, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
    ) -> Float[Tensor, " N"] | None:
        """The baseline at every token's state, or None."""


class NoBaseline(Baseline):
    """Subtract nothing."""

    present = False

    def value(
        self, divergence: Divergence, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
    ) -> Float[Tensor, " N"] | None:
        return None


class ClosedFormBaseline(Baseline):
    """The exact mean of the advantage over the vocabulary; for the reverse KL it is -KL(student ‖ teacher) (vOPD,
    arXiv 2605.07865). It needs the teacher's full law. It does not always lower the variance: log both.
    """

    def value(
        self, divergence: Divergence, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
    ) -> Float[Tensor, " N"] | None:
        return (student.exp() * divergence.advantage(student, teacher)).sum(-1)
