"""Kullback-Leibler divergences: the two directions, their sum, and those against a mixture."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.objectives.divergences.base import Divergence, Normalize, generalized_kl


class ReverseKL(Divergence):
    """KL(student ‖ teacher) = sum p (log p - log q). Mode seeking; the on-policy default.

    Logit gradient ``p (d - KL)`` with ``d = log p - log q``: unbounded where the teacher's probability vanishes.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ReverseKL().total(p, q).item(), 4)
        0.1438
    """

    title = "reverse KL"
    curvature = 1.0
    slope = -1.0

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return generalized_kl(student, teacher)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return teacher - student

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return student - teacher

    def logit_gradient(
        self,
        student: Float[Tensor, "*n V"],
        teacher: Float[Tensor, "*n V"],
        student_probs: Float[Tensor, "*n V"],
        teacher_probs: Float[Tensor, "*n V"],
    ) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]]:
        share = (student - teacher).mul_(student_probs)
        value = share.sum(-1)
        return value, share.addcmul_(student_probs, value[..., None], value=-1.0)


class ForwardKL(Divergence):
    """KL(teacher ‖ student) = sum q (log q - log p). Mass covering.

    Logit gradient ``p - q``: bounded. On a token sampled from the student the advantage is ``q / p - 1``, an importance
    weight without bound, so that pairing is refused.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ForwardKL().total(p, q).item(), 4)
        0.1308
    """

    title = "forward KL"
    curvature = 1.0
    slope = 1.0
    heavy_tailed = True

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return generalized_kl(teacher, student)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return torch.expm1(teacher - student)

    def logit_gradient(
        self,
        student: Float[Tensor, "*n V"],
        teacher: Float[Tensor, "*n V"],
        student_probs: Float[Tensor, "*n V"],
        teacher_probs: Float[Tensor, "*n V"],
    ) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]]:
        return torch.linalg.vecdot(teacher_probs, teacher - student), student_probs - teacher_probs


class Jeffreys(Divergence):
    """KL(teacher ‖ student) + KL(student ‖ teacher) = sum (q - p) (log q - log p) (Jeffreys 1946). Symmetric.

    Logit gradient: the sum of both, ``p - q + p (d - KL(student ‖ teacher))`` with ``d = log p - log q``. The advantage
    ``log u + u - 1`` contains the importance weight.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(Jeffreys().total(p, q).item(), 4)
        0.2747
    """

    title = "Jeffreys divergence"
    curvature = 2.0
    heavy_tailed = True

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return (teacher.exp() - student.exp()) * (teacher - student)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return teacher - student + torch.expm1(teacher - student)


class _MixtureKL(Divergence):
    """``a KL(teacher ‖ m) + b KL(student ‖ m)`` with ``m = c teacher + (1 - c) student``.

    The curvature is ``a (1 - c)^2 + b c^2``. With m held fixed (a = 0), the gradient near agreement is c times, not c^2
    times, that of a unit divergence.
    """

    shares: tuple[float, float]
    weights: tuple[float, float]
    factor: float

    def _define(
        self,
        title: str,
        shares: tuple[float, float],
        weights: tuple[float, float],
        normalize: Normalize,
        frozen: bool = False,
    ) -> None:
        """Set (teacher, student) shares (c, 1 - c) of the mixture and weights (a, b) of the two terms."""
        (c, rest), (a, b) = shares, weights
        self.shares, self.weights, self.frozen = shares, weights, frozen
        self.factor = self._resize(title, b * c if frozen else a * rest**2 + b * c**2, normalize)
        self.slope = self.factor * (a * rest - b * c)

    def _mixture(self, student: Tensor, teacher: Tensor) -> Tensor:
        mixture = torch.logaddexp(teacher + math.log(self.shares[0]), student + math.log(self.shares[1]))
        return mixture.detach() if self.frozen else mixture

    def logit_gradient(
        self,
        student: Float[Tensor, "*n V"],
        teacher: Float[Tensor, "*n V"],
        student_probs: Float[Tensor, "*n V"],
        teacher_probs: Float[Tensor, "*n V"],
    ) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]] | None:
        """For every f-divergence it is ``p (mean_p A - A)`` with the advantage A."""
        if self.frozen:
            return None
        advantage = self.advantage(student, teacher)
        mean = torch.linalg.vecdot(student_probs, advantage)
        return self.total(student, teacher), advantage.sub_(mean[..., None]).neg_().mul_(student_probs)

    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        mixture = self._mixture(student, teacher)
        laws = zip(self.weights, (teacher, student), strict=True)
        terms = [weight * law.exp() * (law - mixture) for weight, law in laws if weight]
        return self.factor * sum(terms[1:], terms[0])

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        if self.frozen:
            return self.factor * generalized_kl(student, self._mixture(student, teacher))
        raw = self.raw(student, teacher)
        return raw - self.slope * (teacher.exp() - student.exp()) if self.slope else raw

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        mixture, (c, rest), (a, b) = self._mixture(student, teacher), self.shares, self.weights
        through_mixture = 0.0 if self.frozen else a * rest - b * c  # 0 for a JSD, whose two parts cancel
        return self.factor * (b * (mixture - student) + through_mixture * torch.expm1(teacher - mixture))

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        # The f whose growth in u is taken out: the first term stays within [-(1 - c) / c - log c, -log c], so a cost drawn
        # from the student is no importance weight.
        mixture, log_c, (a, b) = self._mixture(student, teacher), math.log(self.shares[0]), self.weights
        from_teacher = (teacher - student).exp() * (teacher - mixture + log_c) - log_c
        return self.factor * (a * from_teacher + b * (student - mixture))


class GeneralizedJSD(_MixtureKL):
    """beta KL(teacher ‖ m) + (1 - beta) KL(student ‖ m) with m = beta teacher + (1 - beta) student.

    The definition of GKD (Agarwal et al. 2024, arXiv 2306.13649). Logit gradient ``(1 - beta) p (r - sum p r)`` with
    ``r = log p - log m``: bounded. Its curvature is ``beta (1 - beta)``: it vanishes at both ends, where many trainers
    silently switch to a full-size KL and make the loss jump by 1 / beta. Here the ends are refused, and ``normalize:
    curvature`` divides by ``beta (1 - beta)``, which tends to the forward KL for beta -> 0 and to the reverse KL for
    beta -> 1.

    Args:
        beta: weight of the teacher in the mixture, strictly between 0 and 1.
        normalize: ``none`` is the published form; ``curvature`` makes the size independent of beta.

    Raises:
        ValueError: if beta is not strictly between 0 and 1, or normalize is unknown.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(GeneralizedJSD(beta=0.5).total(p, q).item(), 4)
        0.0338
    """

    def __init__(self, beta: float = 0.5, normalize: Normalize = "none") -> None:
        self._require("beta", beta, 0.0, 1.0, {0.0: "ForwardKL", 1.0: "ReverseKL"})
        self.beta, self.normalize = beta, normalize
        self._define(f"JSD(beta={beta:g})", (beta, 1.0 - beta), (beta, 1.0 - beta), normalize)


class SkewForwardKL(_MixtureKL):
    """KL(teacher ‖ m) with m = alpha teacher + (1 - alpha) student: the skew KL of DistiLLM (arXiv 2402.03898).

    The gradient flows through the student's share of m. Logit gradient ``p sum t - t`` with ``t = (1 - alpha) p q / m``:
    bounded, also where the student's probability vanishes. The advantage ``(1 - alpha) (q / m - 1)`` is at most
    ``(1 - alpha)^2 / alpha``. The curvature is ``(1 - alpha)^2``; in unit curvature it tends to the forward KL for
    alpha -> 0 and to half the Neyman chi-squared for alpha -> 1.

    Args:
        alpha: weight of the teacher in the mixture, strictly between 0 and 1.
        normalize: ``none`` is the published form; ``curvature`` makes the size independent of alpha.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or normalize is unknown.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(SkewForwardKL(alpha=0.1).total(p, q).item(), 4)
        0.107
    """

    def __init__(self, alpha: float = 0.1, normalize: Normalize = "none") -> None:
        self._require("alpha", alpha, 0.0, 1.0, {0.0: "ForwardKL", 1.0: "NeymanChi2"})
        self.alpha, self.normalize = alpha, normalize
        self._define(f"skew forward KL(alpha={alpha:g})", (alpha, 1.0 - alpha), (1.0, 0.0), normalize)


class SkewReverseKL(_MixtureKL):
    """KL(student ‖ m) with m = alpha student + (1 - alpha) teacher: the skew reverse KL of DistiLLM (arXiv 2402.03898).

    Logit gradient ``p (w - sum p w)`` with ``w = log(p / m) + (1 - alpha) q / m`` where it flows through the student's
    share of m, and ``w = log(p / m)`` where m is held fixed: bounded in both cases. The curvature is ``(1 - alpha)^2``; in
    unit curvature it tends to the reverse KL for alpha -> 0 and to half the Pearson chi-squared for alpha -> 1.

    With ``detach_mixture`` (DistiLLM-2, arXiv 2503.07067) the gradient is that of no f-divergence. It falls off with
    ``1 - alpha`` instead, and divided by that tends to the gradients of the reverse KL for alpha -> 0 and of the *forward*
    KL for alpha -> 1.

    Args:
        alpha: weight of the student in the mixture, strictly between 0 and 1.
        normalize: ``none`` is the published form; ``curvature`` makes the size of the gradient independent of alpha.
        detach_mixture: hold the mixture fixed.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or normalize is unknown.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(SkewReverseKL(alpha=0.1).total(p, q).item(), 4)
        0.1131
    """

    def __init__(self, alpha: float = 0.1, normalize: Normalize = "none", detach_mixture: bool = False) -> None:
        self._require("alpha", alpha, 0.0, 1.0, {0.0: "ReverseKL", 1.0: "PearsonChi2"})
        self.alpha, self.normalize = alpha, normalize
        title = f"skew reverse KL(alpha={alpha:g})" + (" with a fixed mixture" if detach_mixture else "")
        self._define(title, (1.0 - alpha, alpha), (0.0, 1.0), normalize, frozen=detach_mixture)
