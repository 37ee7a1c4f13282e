"""Blends of the two KL directions whose weights follow the two laws and are held fixed in the gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.objectives.divergences.base import Divergence, Inseparable, generalized_kl


class AdaptiveKL(Inseparable):
    """h KL(teacher ‖ student) + (1 - h) KL(student ‖ teacher), h the head's share of the gap: AKL (arXiv 2404.02657).

    The head is the teacher's likeliest token and those after it while their cumulative mass is at most mu, and h is the sum
    of abs(q - p) over the head divided by that over all entries (0 where the two are equal). h is held fixed, so the logit
    gradient is ``h (p - q) + (1 - h) p (d - KL(student ‖ teacher))`` with ``d = log p - log q``.

    Args:
        mu: teacher mass of the head, strictly between 0 and 1.

    Raises:
        ValueError: for any other mu.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(AdaptiveKL().total(p, q).item(), 4)
        0.1373
    """

    curvature = 1.0
    frozen = True

    def __init__(self, mu: float = 0.5) -> None:
        self._require("mu", mu, 0.0, 1.0, {1.0: "ForwardKL"})
        self.mu, self.title = mu, f"adaptive KL(mu={mu:g})"

    @torch.no_grad()
    def _head_share(self, student: Tensor, teacher: Tensor) -> Tensor:
        order = teacher.argsort(stable=True, dim=-1, descending=True)
        ours, theirs = (law.gather(-1, order).exp() for law in (student, teacher))
        head = theirs.cumsum(-1) <= self.mu
        head[..., 0] = True
        gap = (theirs - ours).abs()
        tiny = torch.finfo(gap.dtype).tiny
        return gap.where(head, gap.new_zeros(())).sum(-1) / gap.sum(-1).clamp(min=tiny)

    def total(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
        head = self._head_share(student, teacher)
        forward, reverse = generalized_kl(teacher, student).sum(-1), generalized_kl(student, teacher).sum(-1)
        return head * forward + (1.0 - head) * reverse


class ToDi(Divergence):
    """sum a q log(q / p) + (1 - a) p log(p / q) with a = q / (p + q) held fixed at every entry: ToDi (arXiv 2505.16297).

    An entry that the student under-estimates is pulled up by the forward KL, one that it over-estimates is pushed down by
    the reverse KL. Logit gradient ``S - p sum S`` with ``S = (1 - a) p (d + 1) - a q``, ``d = log p - log q``. In value this
    is exactly the Jeffreys divergence, ``sum (q - p) log(q / p)``; only the gradient differs: 3/4 of that of Jeffreys near
    agreement (curvature 3/2). The advantage contains the importance weight.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ToDi().total(p, q).item(), 4)
        0.2747
    """

    title = "ToDi divergence"
    curvature = 1.5
    heavy_tailed = True
    frozen = True

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        weight = (teacher - student).sigmoid().detach()
        return (weight * teacher.exp() - (1.0 - weight) * student.exp()) * (teacher - student)

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        weight, difference = (teacher - student).sigmoid(), teacher - student
        return weight * difference.exp() - (1.0 - weight) * (1.0 - difference)
