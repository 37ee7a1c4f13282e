"""How strong the signal of a sampled token may be.

A shaper bends the signal before credit is given. It keeps the sign and the fixed point, not the gradient: the objective is
another one, whose optimum is the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = ["Clip", "Floor", "NoShape", "PowerDifference", "Shaper", "SoftLog", "Softsign", "Tanh"]


class Shaper(Configurable, ABC):
    """A function of the drawn token's signal.

    Attributes:
        title: what `declared_target` prints; empty if the signal stays what it is.
    """

    title: str = ""

    @abstractmethod
    def shape(
        self, reward: Float[Tensor, " N"], student: Float[Tensor, " N"], teacher: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The signal to use for ``reward``; the log-probabilities are those of the drawn token."""


class NoShape(Shaper):
    """The signal as it is."""

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return reward


class Clip(Shaper):
    """Held between ``-bound`` and ``bound``.

    Args:
        bound: greater than 0, in nats.
    """

    def __init__(self, bound: float) -> None:
        self.bound = positive("Clip", bound)
        self.title = f"clipped to ±{bound:g}"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return reward.clamp(-self.bound, self.bound)


class Floor(Shaper):
    """Never below ``log(share / (1 - share))`` (REOPOLD's reward floor).

    Args:
        share: in (0, 0.5), so that the floor is negative.

    Raises:
        ValueError: for a share outside (0, 0.5).
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0.0 < share < 0.5:
            raise ValueError(f"Floor(share={share}): must lie in (0, 0.5); the floor is log(share / (1 - share)) < 0")
        self.floor = math.log(share / (1.0 - share))
        self.title = f"not below {self.floor:.3g}"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return reward.clamp(min=self.floor)


class Softsign(Shaper):
    """``r / (scale + |r|)``: bounded by 1.

    Args:
        scale: greater than 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive("Softsign", scale)
        self.title = f"softsign at {scale:g}"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return reward / (self.scale + reward.abs())


class Tanh(Shaper):
    """``scale tanh(r / scale)``: bounded by scale.

    Args:
        scale: greater than 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive("Tanh", scale)
        self.title = f"tanh at {scale:g}"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return self.scale * torch.tanh(reward / self.scale)


class SoftLog(Shaper):
    """``sign(r) log(1 + |r|)``: unbounded, but slowly."""

    title = "soft log"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return reward.sign() * torch.log1p(reward.abs())


class PowerDifference(Shaper):
    """``(teacher^a - student^a) / a`` in place of the log-ratio, its limit for a -> 0: bounded by 1 / a (PowerOPD).

    Args:
        power: a, greater than 0.
    """

    def __init__(self, power: float = 1.0) -> None:
        self.power = positive("PowerDifference", power)
        self.title = f"power difference, exponent {power:g}"

    def shape(self, reward: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return ((self.power * teacher).exp() - (self.power * student).exp()) / self.power


def positive(name: str, value: float) -> float:
    """Check an argument."""
    if value <= 0:
        raise ValueError(f"{name}({value}): must be greater than 0")
    return value
