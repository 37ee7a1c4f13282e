"""What is compared at one vocabulary entry.

An f-divergence between the teacher ``q`` and the student ``p`` is ``sum_v p_v f(u_v)`` with ``u = q / p``. ``f`` is
defined up to ``c (u - 1)``, which changes nothing on a proper distribution and everything on a truncated one. So every
divergence has two integrands: `Divergence.entry` uses the ``f`` with ``f'(1) = 0`` (each entry is >= 0 and 0 only when
the two agree there; on a truncated support its sum is the generalised, or Bregman, divergence), and `Divergence.raw` uses
the textbook ``f``.

On a token that the student sampled, the estimator that follows the gradient is ``-A(u) * grad log p`` with the advantage
``A(u) = u f'(u) - f(u)``, never ``-f(u)``; `Divergence.advantage` returns it with ``A(1) = 0``. `Divergence.value` is
``f(u)`` itself, the one-sample estimate of the divergence, used for what a token costs to the tokens before it.

All methods take log-probabilities (student, teacher) of one shape and return that shape, in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = ["Divergence", "ForwardKL", "GeneralizedJSD", "ReverseKL"]


class Divergence(Configurable, ABC):
    """A comparison of two next-token laws, >= 0, and 0 exactly when they are equal.

    Attributes:
        title: the name that `declared_target` prints.
        heavy_tailed: True if the one-sample advantage has no bound in terms of the student's own samples.
    """

    title: str
    heavy_tailed: bool = False

    @property
    @abstractmethod
    def curvature(self) -> float:
        """``f''(1)``: near agreement the divergence is ``curvature / 2 * sum (p - q)^2 / p``. The useful learning rate
        scales with its inverse.
        """

    @abstractmethod
    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """``p f(q / p)`` with ``f'(1) = 0``: never negative."""

    @abstractmethod
    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """``p f(q / p)`` with the textbook ``f``."""

    @abstractmethod
    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``A(u) = u f'(u) - f(u)``, shifted so that ``A(1) = 0``. Ascending ``A log p`` descends the divergence."""

    @abstractmethod
    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``f(u)``: over tokens drawn from the student, its mean is the divergence."""


class ReverseKL(Divergence):
    """KL(student ‖ teacher) = sum p (log p - log q). Mode seeking; the on-policy default.

    Logit gradient ``p (d - KL)`` with ``d = log p - log q``: unbounded where the teacher's probability vanishes.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ReverseKL().entry(p, q).sum().item(), 4)
        0.1438
    """

    title = "reverse KL"
    curvature = 1.0

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return self.raw(student, teacher) - student.exp() + teacher.exp()

    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return student.exp() * (student - teacher)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return teacher - student

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return student - teacher


class ForwardKL(Divergence):
    """KL(teacher ‖ student) = sum q (log q - log p). Mass covering.

    Logit gradient ``p - q``: bounded. On a token sampled from the student the advantage is ``q / p - 1``, an importance
    weight without bound, so that pairing is refused.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ForwardKL().entry(p, q).sum().item(), 4)
        0.1308
    """

    title = "forward KL"
    curvature = 1.0
    heavy_tailed = True

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return self.raw(student, teacher) - teacher.exp() + student.exp()

    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return teacher.exp() * (teacher - student)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.expm1(_log_ratio(student, teacher))

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return _log_ratio(student, teacher).exp() * (teacher - student)


class GeneralizedJSD(Divergence):
    """beta KL(teacher ‖ m) + (1 - beta) KL(student ‖ m) with m = beta teacher + (1 - beta) student.

    The definition of GKD (Agarwal et al. 2024, arXiv 2306.13649). Its curvature is ``beta (1 - beta)``: it vanishes at
    both ends, where many trainers silently switch to a full-size KL and make the loss jump by 1 / beta. Here the ends are
    refused, and ``normalize: curvature`` divides by ``beta (1 - beta)``, which tends to the forward KL for beta -> 0 and
    to the reverse KL for beta -> 1.

    Args:
        beta: weight of the teacher in the mixture, strictly between 0 and 1.
        normalize: ``none`` is the published form; ``curvature`` makes the size independent of beta.

    Raises:
        ValueError: if beta is not strictly between 0 and 1, or normalize is unknown.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(GeneralizedJSD(beta=0.5).entry(p, q).sum().item(), 4)
        0.0338
    """

    def __init__(self, beta: float = 0.5, normalize: Literal["none", "curvature"] = "none") -> None:
        if not 0.0 < beta < 1.0:
            end = "ForwardKL" if beta == 0.0 else "ReverseKL"
            raise ValueError(
                f"GeneralizedJSD(beta={beta}): beta must lie strictly between 0 and 1 (the divergence is 0 at both ends)."
                + (f" Write `divergence: {end}` for that end." if beta in (0.0, 1.0) else "")
            )
        if normalize not in ("none", "curvature"):
            raise ValueError(f"GeneralizedJSD(normalize={normalize!r}): allowed are 'none' and 'curvature'")
        self.beta, self.normalize = beta, normalize
        self.factor = 1.0 / (beta * (1.0 - beta)) if normalize == "curvature" else 1.0
        self.title = f"JSD(beta={beta:g})" + (" in unit curvature" if normalize == "curvature" else "")

    @property
    def curvature(self) -> float:
        return self.factor * self.beta * (1.0 - self.beta)

    def _mixture(self, student: Tensor, teacher: Tensor) -> Tensor:
        return torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return self.raw(student, teacher)  # f'(1) = 0 already

    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        mixture = self._mixture(student, teacher)
        from_teacher = self.beta * teacher.exp() * (teacher - mixture)
        from_student = (1.0 - self.beta) * student.exp() * (student - mixture)
        return self.factor * (from_teacher + from_student)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.factor * (1.0 - self.beta) * (self._mixture(student, teacher) - student)

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        mixture = self._mixture(student, teacher)
        from_teacher = self.beta * _log_ratio(student, teacher).exp() * (teacher - mixture)
        return self.factor * (from_teacher + (1.0 - self.beta) * (student - mixture))


def _log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """Log u on a drawn token, held below the root of the largest number: a token that the student cannot draw stays finite."""
    return (teacher - student).clamp(max=0.5 * math.log(torch.finfo(student.dtype).max))
