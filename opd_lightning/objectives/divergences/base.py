"""What every divergence answers, and what its parametrised families share.

An f-divergence between the teacher ``q`` and the student ``p`` is ``sum_v p_v f(u_v)`` with ``u = q / p``. ``f`` is
defined up to ``c (u - 1)``, which changes nothing on a proper distribution and everything on a truncated one. So every
divergence has two integrands: `Divergence.entry` uses the ``f`` with ``f'(1) = 0`` (each entry is >= 0 and 0 only when
the two agree there; on a truncated support its sum is the generalised, or Bregman, divergence), and `Divergence.raw` uses
the textbook ``f``, whose ``f'(1)`` is `Divergence.slope`.

On a token that the student sampled, the estimator that follows the gradient is ``-A(u) * grad log p`` with the advantage
``A(u) = u f'(u) - f(u)``, never ``-f(u)``; `Divergence.advantage` returns it with ``A(1) = 0``. `Divergence.value` is
``f(u)`` itself, the one-sample estimate of the divergence, used for what a token costs to the tokens before it.

All methods take log-probabilities (student, teacher) of one shape and return that shape, in nats; `Divergence.total` sums
over the last axis. Gradient flows to the student alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable

Normalize = Literal["none", "curvature"]


class Divergence(Configurable, ABC):
    """A comparison of two next-token laws, >= 0, and 0 exactly when they are equal.

    Attributes:
        title: the name that `declared_target` prints.
        curvature: ``f''(1)``: near agreement the gradient is that of ``curvature / 2 * sum (p - q)^2 / p``, and the useful
            learning rate scales with its inverse. Infinite where the divergence has a kink at agreement.
        slope: ``f'(1)`` of the textbook ``f``. What `raw` adds to `entry` is ``slope * (q - p)``: a truncated raw sum
            drains the student's mass from the support if it is negative, and piles it up there if it is positive.
        heavy_tailed: True if the variance of the one-sample advantage has no bound as the student's probability of a token
            that the teacher wants goes to 0, as for an importance weight.
        separable: True if it is a sum over entries. Otherwise `entry`, `raw`, `advantage` and `value` do not exist.
        frozen: True if a part of it (weights, a mixture) is held fixed: the gradient is that of the value with this part
            as a constant, not that of the value.
    """

    title: str
    curvature: float
    slope: float = 0.0
    heavy_tailed: bool = False
    separable: bool = True
    frozen: bool = False

    @abstractmethod
    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """``p f(q / p)`` with ``f'(1) = 0``: never negative."""

    @abstractmethod
    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``A(u) = u f'(u) - f(u)``, shifted so that ``A(1) = 0``. Ascending ``A log p`` descends the divergence."""

    def total(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
        """The divergence of two laws on the last axis, each of mass 1."""
        return self.entry(student, teacher).sum(-1)

    def raw(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """``p f(q / p)`` with the textbook ``f``."""
        entry = self.entry(student, teacher)
        return entry + self.slope * (teacher.exp() - student.exp()) if self.slope else entry

    def value(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``f(u)``: over tokens drawn from the student, its mean is the divergence. Any equivalent ``f`` will do; the one
        with the lightest tail is best.
        """
        return self.entry(student[..., None], teacher[..., None])[..., 0] * (-student).exp()

    def logit_gradient(
        self,
        student: Float[Tensor, "*n V"],
        teacher: Float[Tensor, "*n V"],
        student_probs: Float[Tensor, "*n V"],
        teacher_probs: Float[Tensor, "*n V"],
    ) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]] | None:
        """`total` of two whole laws and its gradient with respect to the student's logits, in closed form and without a graph.

        The probabilities of both laws are given too, and stay as they are. Worth writing for a divergence that is used on large
        vocabularies; None leaves it to autograd.
        """
        return None

    def _resize(self, title: str, curvature: float, normalize: Normalize) -> float:
        """Set title and curvature of a member of a family; returns the factor of everything that it computes.

        Args:
            title: of the published form.
            curvature: of the published form.
            normalize: ``none`` is the published size; ``curvature`` divides by the curvature, so that the size, and with
                it the learning rate, does not depend on the parameter, and the family is continuous up to its ends.

        Raises:
            ValueError: for an unknown normalize.
        """
        if normalize not in get_args(Normalize):
            raise ValueError(f"{type(self).__name__}(normalize={normalize!r}): allowed are 'none' and 'curvature'")
        unit = normalize == "curvature"
        self.title = f"{title} in unit curvature" if unit else title
        self.curvature = 1.0 if unit else curvature
        return 1.0 / curvature if unit else 1.0

    def _require(self, key: str, given: float, low: float, high: float, instead: Mapping[float, str]) -> None:
        """Check a parameter of a family.

        Args:
            key: the parameter's name.
            given: its value.
            low: it must be greater.
            high: it must be less.
            instead: what to write at the ends, and at values between them that have a class of their own.

        Raises:
            ValueError: saying what was given, what is allowed and what to write instead.
        """
        if low < given < high and given not in instead:
            return
        between = ", ".join(f"{value:g}" for value in sorted(instead) if low < value < high)
        edge = min(max(given, low), high)
        raise ValueError(
            f"{type(self).__name__}({key}={given}): {key} must lie strictly between {low:g} and {high:g}"
            + (f" and differ from {between}" if between else "")
            + (f". Write `divergence: {instead[edge]}` for {key} = {edge:g}" if edge in instead else "")
        )


class Inseparable(Divergence):
    """A divergence that is not a sum over vocabulary entries: it has a `total` on two whole laws and nothing else.

    A truncated sum of it does not exist, and one sampled token does not determine its advantage.
    """

    separable = False

    @abstractmethod
    def total(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
        """The divergence of two laws on the last axis, each of mass 1."""

    def entry(self, student: Float[Tensor, "*n K"], teacher: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """Raises:
        TypeError: always.
        """
        raise TypeError(f"the {self.title} is not a sum over entries; use `total` on whole laws")

    def advantage(self, student: Float[Tensor, "*n"], teacher: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Raises:
        TypeError: always.
        """
        raise TypeError(f"the {self.title} gives a single token no advantage; use `total` on whole laws")


def generalized_kl(one: Float[Tensor, "*n K"], other: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
    """``a log(a / b) - a + b`` per entry, from log a and log b: never negative, and 0 with zero gradient at a = b."""
    return one.exp() * (one - other) - one.exp() + other.exp()
