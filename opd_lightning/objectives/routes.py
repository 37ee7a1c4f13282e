"""Where probability goes when a sampled token is suppressed.

A plain policy gradient moves the logits by ``A (e_a - p)``: with a negative advantage the mass leaves token a for whatever the
student already likes, also for tokens that the teacher likes even less. A route names a destination c instead::

    ascent direction for A < 0:   |A| ((1 - w g) p + w g c - e_a)
    ascent direction for A >= 0:  k A (e_a - p)

with the strength w, a gate g of the state, and k = 1, or 1 - w g where balanced. With the canonical destination
``c_v = p_v (A_v)_+ / sum`` over all tokens and a closed-form baseline the negative events alone add up to the exact gradient of
the token-level reverse KL, so the balanced form is unbiased for every w.

Where the sampled token is judged in a coarsening of the vocabulary (`SampledToken(k)`), so is the route, and its theorems hold
there: the tail entry may receive canonical mass, but is no alternative that anybody chose.

In probability space (natural routing) a suppressed token's mass goes to the destinations and nowhere else::

    ascent direction for A < 0:   |A| (p_a c_v / p_v - e_a),   so that to first order p changes by |A| p_a (c - e_a)

Counterfactual routing is a direction named by arXiv 2606.22793, which gives no formula and no experiment; this form is derived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.supports import World
from opd_lightning.ops import logprobs as lp

__all__ = ["CounterfactualRoute", "Route", "Vanilla"]

Destination = Literal["canonical", "geometric", "lookahead"]
Space = Literal["logit", "probability"]


class Routed(NamedTuple):
    """What a route needs of the vocabulary, per token.

    Attributes:
        log_destination: (N,) ``sum_v c_v log p_v``, differentiated through p alone; in probability space with the weights
            whose gradient is ``p_a c_v / p_v - p_v``, up to what is equal for all v.
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
        strength: w, how much of a suppressed token's mass is routed at most; 0 is the plain gradient.
        needs_ahead: it must know what follows every token of the vocabulary (see `Extras.ahead`).
    """

    title: str = ""
    bias: str = ""
    balanced: bool = False
    strength: float = 0.0
    needs_ahead: bool = False

    @abstractmethod
    def score(self, world: World, ahead: Float[Tensor, "N V"] | None = None) -> Routed | None:
        """Destinations at every token, or None for the plain gradient; ``ahead`` is what reaching each entry will cost."""

    def surrogate(self, advantage: Tensor, logprob: Tensor, log_destination: Tensor, share: Tensor) -> Float[Tensor, "B T"]:
        """What is ascended: ``k A log p(a)``, plus ``w g |A| sum_v c_v log p_v`` for negative advantages. Detached but for
        the two log-probabilities.
        """
        negative = (advantage < 0).to(advantage.dtype)
        weight = 1.0 - share * (1.0 - negative) if self.balanced else 1.0
        return weight * advantage * logprob + negative * share * advantage.abs() * log_destination


class Vanilla(Route):
    """The plain policy gradient: the soft-max decides."""

    def score(self, world: World, ahead: Tensor | None = None) -> Routed | None:
        return None


class CounterfactualRoute(Route):
    """Routes to alternatives that the teacher supports and the student can reach.

    Args:
        destination: ``canonical``: ``p_v (A_v)_+`` with the reverse-KL advantage ``A_v = log q_v - log p_v + KL``;
            ``geometric``: ``p_v^(1 - alpha) q_v^alpha`` on the tokens with ``log q_v > log p_v + margin`` that are
            reachable, the drawn one and the tail left out; ``lookahead``: canonical with ``A_v = Q(s, v) - V(s)``, what follows
            a token counted in, for credits that look further than the token.
        strength: w, in [0, 1]; 0 is the plain gradient.
        balanced: weaken positive events by as much as negative ones are routed. With ``canonical`` it is unbiased, with
            ``lookahead`` where the advantages are exact too.
        alpha: share of the teacher in the geometric destination, in [0, 1].
        margin: nats by which the teacher must prefer a token, at least 0 (geometric).
        max_ratio: reachable means ``q_v <= max_ratio p_v``, at least 1 (geometric). In probability space for all
            destinations, and the gate closes where some ``c_v > max_ratio p_v``: nobody can be moved to what is not there.
        min_support: the gate closes where the teacher gives all destinations together less than this, in [0, 1).
        max_teacher_entropy: the gate closes above it, in nats; null leaves it open.
        space: ``logit`` adds the destinations to the plain gradient; ``probability`` moves mass to them alone.

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
        space: Space = "logit",
    ) -> None:
        for key, choice, allowed in (("destination", destination, Destination), ("space", space, Space)):
            if choice not in get_args(allowed):
                raise ValueError(f"CounterfactualRoute({key}={choice!r}): allowed are {', '.join(get_args(allowed))}")
        for key, value in (("strength", strength), ("alpha", alpha), ("min_support", min_support)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"CounterfactualRoute({key}={value}): must lie in [0, 1]")
        if margin < 0.0 or max_ratio < 1.0:
            raise ValueError(f"CounterfactualRoute(margin={margin}, max_ratio={max_ratio}): at least 0, and at least 1")
        self.destination, self.space, self.strength, self.balanced = destination, space, strength, balanced
        self.alpha, self.margin, self.max_ratio = alpha, margin, max_ratio
        self.min_support, self.max_teacher_entropy = min_support, max_teacher_entropy
        self.needs_ahead = destination == "lookahead"
        self.title = f"{'balanced ' if balanced else ''}{destination} route, strength {strength:g}"
        if space == "probability":
            self.title += ", in probability space"
        if strength and not (balanced and destination != "geometric" and space == "logit"):
            self.bias = "routing adds a pull towards its destinations, which vanishes where student and teacher agree"
        elif strength and destination == "lookahead":
            self.bias = "balanced only as far as advantages and look-ahead are the exact ones"

    def score(self, world: World, ahead: Tensor | None = None) -> Routed:
        with torch.no_grad():
            weights, share = self._weights(world, ahead)
        return Routed((weights * world.student).sum(-1), share)

    def _weights(self, world: World, ahead: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, J) what multiplies the log-probabilities, and (N,) the share."""
        student, teacher, tokens, _ = world
        probs = student.exp()
        relative = self._relative(world, probs, ahead)
        size = probs.mul_(relative)
        total = size.sum(-1, keepdim=True)
        open_ = total.squeeze(-1) > 0
        if self.min_support:
            open_ &= (teacher.exp().mul_(relative > 0)).sum(-1) >= self.min_support
        if self.max_teacher_entropy is not None:
            open_ &= lp.entropy(teacher) <= self.max_teacher_entropy
        total = total.clamp(min=torch.finfo(size.dtype).tiny)
        if self.space == "logit":
            return size.div_(total), self.strength * open_.to(size.dtype)
        steepest = relative / total  # c_v / p_v
        open_ &= steepest.amax(-1) <= torch.as_tensor(self.max_ratio, dtype=size.dtype)
        moved = student.gather(-1, tokens[:, None]).exp() * steepest.where(open_[:, None], 0.0)
        weights = moved - (moved.sum(-1, keepdim=True) - 1.0) / moved.shape[-1]  # sum to 1, as c does
        return weights, self.strength * open_.to(size.dtype)

    def _relative(self, world: World, probs: Tensor, ahead: Tensor | None) -> Tensor:
        """(N, J) destinations over p, before they are normalised; above 0 where there is one.

        Log-probabilities have a floor, so what is left out is multiplied by 0: on a CPU, `where` takes many times as long.
        """
        student, teacher, tokens, tail = world
        gap = teacher - student
        if self.destination == "geometric":
            relative = (self.alpha * gap).exp_().mul_(gap > self.margin).mul_(gap <= self._farthest(gap))
            relative.scatter_(-1, tokens[:, None], 0.0)
            if tail:
                relative[:, -1] = 0.0
            return relative
        value = gap
        if self.needs_ahead:
            if ahead is None:
                raise ValueError(
                    "CounterfactualRoute(destination='lookahead') needs what follows every token (Extras.ahead), which only "
                    "enumerable worlds know: use `destination: canonical`"
                )
            value = gap - ahead.to(gap.dtype)
        gain: Tensor = (value - torch.linalg.vecdot(probs, value)[:, None]).clamp_(min=0.0)
        return gain if self.space == "logit" else gain.mul_(gap <= self._farthest(gap))

    def _farthest(self, gap: Tensor) -> Tensor:
        """Log-ratio up to which a token is reachable."""
        return torch.as_tensor(self.max_ratio, dtype=gap.dtype).log()
