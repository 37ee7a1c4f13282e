"""What is done when the law that drew a token is not the one that is trained (stale rollouts, other samplers).

With the log-ratio ``l = log p(token) - log p_sampler(token)`` the sampled part of every objective has the gradient
``- w A grad log p(token)``; a correction is the detached weight w. All (B, T) arguments are detached.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = [
    "Correction",
    "ICEPop",
    "NoCorrection",
    "PPOClip",
    "PrefixProduct",
    "SequenceMask",
    "TokenRatio",
    "TruncatedRatio",
    "TrustRegionDrop",
]


class Reach(NamedTuple):
    """How much likelier the student is than the sampler to get this far: (B, T), detached.

    Attributes:
        state: product of the ratios of the tokens before.
        token: the same with the token's own ratio.
    """

    state: Tensor
    token: Tensor


class Correction(Configurable, ABC):
    """A weight for every sampled token.

    Attributes:
        title: what `declared_target` prints.
        bias: what it leaves uncorrected when the rollouts are not the student's own; empty if nothing.
    """

    title: str
    bias: str

    @abstractmethod
    def weight(
        self, log_ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """w, 1 everywhere when the sampler is the student itself."""

    def reach(self, log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Reach | None:
        """Weights of divergences, signals and costs where they stand, before credit is given; None for 1."""
        return None


class TokenRatio(Correction):
    """``w = p / p_sampler`` of the token: exact for the drawn action, on the states that the sampler visited."""

    title, bias = "token ratio", "states are the sampler's"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return log_ratio.exp()


class NoCorrection(Correction):
    """``w = 1``: right only when the student itself wrote the text just now."""

    title, bias = "no correction", "tokens and states are the sampler's"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return torch.ones_like(log_ratio)


class PPOClip(Correction):
    """The clipped surrogate of PPO (arXiv 1707.06347): the ratio, and 0 where it has already gone too far the advantage's way.

    Args:
        low: w falls to 0 below 1 - low for negative advantages.
        high: and above 1 + high for positive ones; null takes ``low``.

    Raises:
        ValueError: unless 0 < low < 1 and high > 0.
    """

    bias = "states are the sampler's; large ratios get no gradient"

    def __init__(self, low: float = 0.2, high: float | None = None) -> None:
        high = low if high is None else high
        if not 0.0 < low < 1.0 or high <= 0.0:
            raise ValueError(f"PPOClip(low={low}, high={high}): low must lie in (0, 1), high above 0")
        self.low, self.high = low, high
        self.title = f"PPO clip {low:g}/{high:g}"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        beyond = torch.where(advantage >= 0, ratio > 1.0 + self.high, ratio < 1.0 - self.low)
        return ratio.masked_fill(beyond, 0.0)


class TruncatedRatio(Correction):
    """Truncated importance sampling: the ratio, held between two bounds.

    Args:
        high: upper bound, at least 1.
        low: lower bound, in [0, 1].

    Raises:
        ValueError: for bounds on the wrong side of 1.
    """

    bias = "states are the sampler's; ratios beyond the bounds are cut"

    def __init__(self, high: float = 2.0, low: float = 0.0) -> None:
        self.low, self.high = _bounds("TruncatedRatio", low, high)
        self.title = f"ratio truncated to [{low:g}, {high:g}]"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return log_ratio.exp().clamp(self.low, self.high)


class ICEPop(Correction):
    """The ratio inside two bounds, 0 outside: a token whose ratio is off is dropped, not cut (ICE-POP, arXiv 2510.18855).

    Args:
        low: lower bound, in [0, 1].
        high: upper bound, at least 1.

    Raises:
        ValueError: for bounds on the wrong side of 1.
    """

    bias = "states are the sampler's; tokens beyond the bounds are dropped"

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        self.low, self.high = _bounds("ICEPop", low, high)
        self.title = f"ratio within [{low:g}, {high:g}], else dropped"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        return ratio.where((ratio >= self.low) & (ratio <= self.high), 0.0)


class SequenceMask(Correction):
    """The token ratio, on completions whose geometric mean ratio lies between two bounds; the others are dropped whole.

    Args:
        low: lower bound, in [0, 1].
        high: upper bound, at least 1.

    Raises:
        ValueError: for bounds on the wrong side of 1.
    """

    bias = "states are the sampler's; completions beyond the bounds are dropped"

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        self.low, self.high = _bounds("SequenceMask", low, high)
        self.title = f"completions with mean ratio within [{low:g}, {high:g}]"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        mean = (log_ratio.where(mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        return log_ratio.exp().where((mean >= self.low) & (mean <= self.high), 0.0)


class PrefixProduct(Correction):
    """The product of all ratios of the prefix: corrects the visited states too, at a variance that grows with the length.

    Every signal and every cost is weighted where it stands (per-decision importance sampling), so a later cost carries the
    ratios up to its own token, not only up to the token that answers for it; exact divergences carry those of their state.

    Args:
        cap: largest product; 0 leaves it free. A cap makes it a truncated, biased correction.

    Raises:
        ValueError: for a negative cap.
    """

    def __init__(self, cap: float = 0.0) -> None:
        if cap < 0.0:
            raise ValueError(f"PrefixProduct(cap={cap}): must be at least 0 (0 leaves the product free)")
        self.cap = cap
        self.title = "product of the ratios of the prefix" + (f", at most {cap:g}" if cap else "")
        self.bias = "products beyond the cap are cut" if cap else ""

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return torch.ones_like(log_ratio)

    def reach(self, log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Reach | None:
        own = log_ratio.where(mask, 0.0)
        most = math.log(self.cap) if self.cap else 0.5 * math.log(torch.finfo(own.dtype).max)  # finite, also times a cost
        token = own.cumsum(-1)
        return Reach((token - own).clamp(max=most).exp(), token.clamp(max=most).exp())


class TrustRegionDrop(Correction):
    """The token ratio, dropped where the student's probability has moved too far from the sampler's, up or down.

    Args:
        max_log_ratio: largest ``abs(log p - log p_sampler)`` that is kept, greater than 0.

    Raises:
        ValueError: for a bound that is not positive.
    """

    bias = "states are the sampler's; tokens that moved too far are dropped"

    def __init__(self, max_log_ratio: float = 0.5) -> None:
        if max_log_ratio <= 0.0:
            raise ValueError(f"TrustRegionDrop(max_log_ratio={max_log_ratio}): must be greater than 0")
        self.max_log_ratio = max_log_ratio
        self.title = f"token ratio, dropped beyond a log-ratio of {max_log_ratio:g}"

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return log_ratio.exp().where(log_ratio.abs() <= self.max_log_ratio, 0.0)


def _bounds(name: str, low: float, high: float) -> tuple[float, float]:
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(f"{name}(low={low}, high={high}): needs 0 <= low <= 1 <= high")
    return low, high
