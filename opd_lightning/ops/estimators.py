"""One-sample estimators of the reverse KL, for logging.

With ``d = student - teacher`` on a token that the student sampled, each of the three has the reverse KL as its mean (k2
approximately), and none is offered as a divergence: differentiated, k1 has expected gradient zero and k3 descends the
*forward* KL (k2 happens to follow the reverse KL). Values and gradients are different things; see
http://joschu.net/blog/kl-approx.html for the values.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def k1(student: Float[Tensor, " N"], teacher: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``d``: unbiased, signed, high variance. As a loss: expected gradient 0."""
    return student - teacher


def k2(student: Float[Tensor, " N"], teacher: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``d^2 / 2``: biased, never negative. As a loss: the reverse-KL gradient."""
    return 0.5 * (student - teacher).square()


def k3(student: Float[Tensor, " N"], teacher: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``exp(-d) - 1 + d``: unbiased, never negative. As a loss: the *forward*-KL gradient."""
    ratio = teacher - student
    return ratio.exp() - 1.0 - ratio
