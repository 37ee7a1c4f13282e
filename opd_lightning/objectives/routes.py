"""Where probability goes when a sampled token is suppressed.

A plain policy gradient moves the logits by ``A (e_a - p)``: with a negative advantage the mass leaves token a for whatever the
student already likes, also for tokens that the teacher likes even less. A route names a destination c instead::

    ascent direction for A < 0:   |A| ((1 - w g) p + w g c - e_a)
    ascent direction for A >= 0:  k A (e_a - p)

with the strength w, a gate g of the state, and k = 1, or 1 - w g where balanced. With the canonical destination
``c_v = p_v (A_v)_+ / sum`` over all tokens and a closed-form baseline the negative events alone add up to the exact gradient of
the token-level reverse KL, so the balanced form is unbiased for every w.

Counterfactual routing is a direction named by arXiv 2606.22793, which gives no formula and no experiment; this form is derived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.ops import logprobs as lp

__all__ = ["CounterfactualRoute", "Route", "Vanilla"]

Destination = Literal["canonical", "geometric"]


class Routed(NamedTuple):
    """What a route needs of the vocabulary, per token.

    Attributes:
        log_destination: (N,) ``sum_v c_v log p_v``, differentiated through p alone.
        share: (N,) detached ``w g``: how much of a suppressed token's mass is routed; 0 falls back to the plain gradient.
    """

    log_destination: Tensor
    share: Tensor


class Route(Configurable, ABC):
    """Destination of suppressed mass.

    Attributes:
        title: what `declared_target` prints; empty for the plain gradient.
        bias: what separates it from the gradient of the divergence; empty if nothing.
        balanced: positive events are weakened by as much as negative ones are routed.
    """

    title: str = ""
    bias: str = ""
    balanced: bool = False

    @abstractmethod
    def score(self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Routed | None:
        """Destinations at every token, or None for the plain gradient."""

    def surrogate(self, advantage: Tensor, logprob: Tensor, log_destination: Tensor, share: Tensor) -> Float[Tensor, "B T"]:
        """What is ascended: ``k A log p(a)``, plus ``w g |A| sum_v c_v log p_v`` for negative advantages. Detached but for
        the two log-probabilities.
        """
        negative = (advantage < 0).to(advantage.dtype)
        weight = 1.0 - share * (1.0 - negative) if self.balanced else 1.0
        return weight * advantage * logprob + negative * share * advantage.abs() * log_destination


class Vanilla(Route):
    """The plain policy gradient: the soft-max decides."""

    def score(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Routed | None:
        return None


class CounterfactualRoute(Route):
    """Routes to alternatives that the teacher supports and the student can reach.

    Args:
        destination: ``canonical``: ``p_v (A_v)_+`` with the reverse-KL advantage ``A_v = log q_v - log p_v + KL``;
            ``geometric``: ``p_v^(1 - alpha) q_v^alpha`` on the tokens with ``log q_v > log p_v + margin`` that are
            reachable, the drawn one left out.
        strength: w, in [0, 1]; 0 is the plain gradient.
        balanced: weaken positive events by as much as negative ones are routed. With ``canonical`` it is unbiased.
        alpha: share of the teacher in the geometric destination, in [0, 1].
        margin: nats by which the teacher must prefer a token, at least 0 (geometric).
        max_ratio: reachable means ``q_v <= max_ratio p_v``, at least 1 (geometric).
        min_support: the gate closes where the teacher gives all destinations together less than this, in [0, 1).
        max_teacher_entropy: the gate closes above it, in nats; null leaves it open.

    Raises:
        ValueError: for arguments outside these ranges.
    """

    def __init__(
        self,
        destination: Destination = "canonical",
        strength: float = 0.5,
        balanced: bool = False,
        alpha: float = 0.5,
        margin: float = 0.0,
        max_ratio: float = 50.0,
        min_support: float = 0.0,
        max_teacher_entropy: float | None = None,
    ) -> None:
        if destination not in get_args(Destination):
            raise ValueError(f"CounterfactualRoute(destination={destination!r}): allowed are canonical and geometric")
        for key, value in (("strength", strength), ("alpha", alpha), ("min_support", min_support)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"CounterfactualRoute({key}={value}): must lie in [0, 1]")
        if margin < 0.0 or max_ratio < 1.0:
            raise ValueError(f"CounterfactualRoute(margin={margin}, max_ratio={max_ratio}): at least 0, and at least 1")
        self.destination, self.strength, self.balanced, self.alpha = destination, strength, balanced, alpha
        self.margin, self.max_ratio = margin, max_ratio
        self.min_support, self.max_teacher_entropy = min_support, max_teacher_entropy
        self.title = f"{'balanced ' if balanced else ''}{destination} route, strength {strength:g}"
        if strength and not (balanced and destination == "canonical"):
            self.bias = "routing adds a pull towards its destinations, which vanishes where student and teacher agree"

    def score(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> Routed:
        with torch.no_grad():
            target, share = self._destinations(student, teacher, tokens)
        return Routed((target * student).sum(-1), share)

    def _destinations(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        gap = teacher - student
        if self.destination == "canonical":
            kl = -(student.exp() * gap).sum(-1, keepdim=True)
            support = gap + kl > 0
            size = student.exp() * (gap + kl).clamp(min=0.0)
        else:
            reachable = gap <= torch.as_tensor(self.max_ratio, dtype=gap.dtype).log()
            support = (gap > self.margin) & reachable
            support = support.scatter(-1, tokens[:, None], value=False)
            size = ((1.0 - self.alpha) * student + self.alpha * teacher).exp() * support
        total = size.sum(-1, keepdim=True)
        open_ = (total.squeeze(-1) > 0) & ((teacher.exp() * support).sum(-1) >= self.min_support)
        if self.max_teacher_entropy is not None:
            open_ &= lp.entropy(teacher) <= self.max_teacher_entropy
        target = size / total.clamp(min=torch.finfo(size.dtype).tiny)
        return target, self.strength * open_.to(student.dtype)
