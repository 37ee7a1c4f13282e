"""f-divergences other than those made of KL terms, and the Rényi divergences."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.objectives.divergences.base import Divergence, Inseparable, Normalize


class TotalVariation(Divergence):
    """1/2 sum abs(q - p), the total variation distance; for distillation: f-distill (arXiv 2307.15190).

    Logit gradient ``p (r - sum p r) / 2`` with ``r = sign(p - q)``: bounded by 1/4, but it does not fade near agreement
    (there is a kink, so no curvature), where it is the sign of noise. It is 0 where the two are equal.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(TotalVariation().total(p, q).item(), 4)
        0.25
    """

    title = "total variation"
    curvature = math.inf

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return (teacher.exp() - student.exp()).abs() / 2

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (teacher - student).sign() / 2

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return -torch.expm1((teacher - student).clamp(max=0.0))  # (1 - u)+, which has the mean of abs(u - 1) / 2


def _held(log_power: Tensor) -> Tensor:
    """Below three quarters of the largest exponent, so that sums over tokens stay finite where one law is all but 0."""
    return log_power.clamp(max=0.75 * math.log(torch.finfo(log_power.dtype).max))


class _Power(Divergence):
    """``factor * (sum q^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1))``: the power (alpha-)divergences, any alpha but 0, 1.

    Logit gradient ``factor * (p sum S - S) / alpha`` with ``S = q^alpha p^(1 - alpha)``. The advantage
    ``factor * (u^alpha - 1) / alpha`` has a variance of order ``sum p u^(2 alpha)``: bounded for 0 < alpha <= 1/2, not above.
    Below 0 it is as unbounded as the gradient itself (where the teacher's probability vanishes), not more.
    """

    alpha: float
    factor: float

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        # The family is symmetric under (p, q, alpha) -> (q, p, 1 - alpha). On this side of 1/2 no power overflows while
        # -1 <= alpha <= 2, and expm1(a x) / a keeps its precision up to the KL at a = 0.
        if self.alpha <= 0.5:
            base, other, a = student, teacher, self.alpha
        else:
            base, other, a = teacher, student, 1.0 - self.alpha
        power = base.exp() * torch.expm1(_held(a * (other - base))) / a
        return self.factor / (a - 1.0) * (power - other.exp() + base.exp())

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.factor * torch.expm1(_held(self.alpha * (teacher - student))) / self.alpha

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.factor * torch.expm1(_held(self.alpha * (teacher - student))) / (self.alpha * (self.alpha - 1.0))


class Amari(_Power):
    """(sum q^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1)): the alpha-divergence (Amari 1985; Cichocki & Amari 2010).

    Unit curvature for every alpha, and continuous: the reverse KL for alpha -> 0, four times `Hellinger` at 1/2, the forward
    KL for alpha -> 1. Gradient and tails as in the table: mass covering, with unbounded importance weights, above 1/2.

    Args:
        alpha: strictly between -1 and 2, not 0 or 1. Beyond, q^alpha p^(1 - alpha) leaves the range of float32.

    Raises:
        ValueError: for any other alpha, naming the class that stands for it.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(Amari(alpha=0.3).total(p, q).item(), 4)
        0.139
    """

    curvature = 1.0
    factor = 1.0

    def __init__(self, alpha: float = 0.5) -> None:
        instead = {-1.0: "NeymanChi2", 0.0: "ReverseKL", 1.0: "ForwardKL", 2.0: "PearsonChi2"}
        self._require("alpha", alpha, -1.0, 2.0, instead)
        self.alpha, self.heavy_tailed = alpha, alpha > 0.5
        self.slope = 1.0 / (alpha - 1.0)
        self.title = f"Amari divergence(alpha={alpha:g})"


class Hellinger(_Power):
    """1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q), the squared Hellinger distance (Hellinger 1909). Symmetric.

    Logit gradient ``(p sum S - S) / 2`` with ``S = sqrt(p q)``: bounded. The advantage ``(sqrt u - 1) / 2`` has no bound,
    but a variance of at most 1/2.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(Hellinger().total(p, q).item(), 4)
        0.0341
    """

    title = "squared Hellinger distance"
    alpha, factor, curvature = 0.5, 0.25, 0.25


class PearsonChi2(_Power):
    """sum (q - p)^2 / p = sum q^2 / p - 1, Pearson's chi-squared of teacher against student (Pearson 1900).

    Logit gradient ``p sum S - S`` with ``S = q^2 / p``: explodes where the student's probability vanishes. The advantage is
    ``u^2 - 1``.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(PearsonChi2().total(p, q).item(), 4)
        0.25
    """

    title = "Pearson chi-squared"
    alpha, factor, curvature = 2.0, 2.0, 2.0
    heavy_tailed = True


class NeymanChi2(_Power):
    """sum (p - q)^2 / q = sum p^2 / q - 1, Neyman's chi-squared: that of student against teacher (Neyman 1949).

    Logit gradient ``2 (S - p sum S)`` with ``S = p^2 / q``: explodes where the teacher's probability vanishes, and so does the
    advantage ``2 (1 - p / q)``, which is at most 2.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(NeymanChi2().total(p, q).item(), 4)
        0.3333
    """

    title = "Neyman chi-squared"
    alpha, factor, curvature = -1.0, 2.0, 2.0
    slope = -1.0


class Renyi(Inseparable):
    """log(sum q^alpha p^(1 - alpha)) / (alpha - 1): the Rényi divergence of teacher from student (Rényi 1961).

    Logit gradient ``p - S / sum S`` with ``S = q^alpha p^(1 - alpha)``: bounded for every alpha. It is the forward KL to the
    tilted teacher ``S / sum S`` held fixed. The curvature is alpha; in unit curvature it tends to the reverse KL for
    alpha -> 0, and in either size to the forward KL for alpha -> 1. The logarithm couples all entries.

    Args:
        alpha: greater than 0, not 1.
        normalize: ``none`` is the published form; ``curvature`` makes the size independent of alpha.

    Raises:
        ValueError: for any other alpha, or an unknown normalize.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(Renyi(alpha=2.0).total(p, q).item(), 4)
        0.2231
    """

    def __init__(self, alpha: float = 0.5, normalize: Normalize = "none") -> None:
        self._require("alpha", alpha, 0.0, math.inf, {0.0: "ReverseKL", 1.0: "ForwardKL"})
        self.alpha, self.normalize = alpha, normalize
        self.factor = self._resize(f"Renyi divergence(alpha={alpha:g})", alpha, normalize)

    def total(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
        mass = (self.alpha * teacher + (1.0 - self.alpha) * student).logsumexp(-1)
        return self.factor / (self.alpha - 1.0) * mass
