"""What a sum over tokens is divided by.

Lightning divides a micro-batch's loss by the number of accumulated micro-batches, and DDP averages gradients over ranks.
A mean taken inside each micro-batch is then a mean of means, off by 15 % with ordinary length differences. Instead the
rollout buffer adds up `Reduction.denominator` over the whole optimizer step and all ranks before the first backward, and
every micro-batch is multiplied by ``ranks * micro-batches / denominator``: one exact division.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = ["Constant", "Reduction", "SequenceMean", "TokenMean"]


class Reduction(Configurable, ABC):
    """Weights of the tokens and the denominator of their sum."""

    @abstractmethod
    def weights(self, mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B T"]:
        """Factor of each token, 0 where masked."""

    @abstractmethod
    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        """This batch's share of the divisor; shares add up over micro-batches and ranks."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What `declared_target` prints."""


class TokenMean(Reduction):
    """Every token of the optimizer step weighs the same, over all micro-batches and ranks."""

    title = "token mean"

    def weights(self, mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B T"]:
        return mask.to(dtype)

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return float(mask.sum())


class SequenceMean(Reduction):
    """Every completion weighs the same: mean over its tokens, then mean over completions.

    Tokens of long completions weigh less. With an EOS the weight 1 / length depends on the sampled tokens, so the
    sampled-token gradient of this reduction is not that of its value.
    """

    title = "sequence mean"

    def weights(self, mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B T"]:
        return mask.to(dtype) / mask.sum(-1, keepdim=True).clamp(min=1)

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return float(mask.any(-1).sum())


class Constant(Reduction):
    """The sum over each completion divided by a fixed length, then the mean over completions: the gradient of the summed
    divergence, free of the sampled lengths.

    Args:
        length: tokens that a completion is counted as, greater than 0.

    Raises:
        ValueError: if length is not positive.
    """

    def __init__(self, length: float) -> None:
        if length <= 0:
            raise ValueError(f"Constant(length={length}): the length must be greater than 0")
        self.length = length

    @property
    def title(self) -> str:
        return f"sum / {self.length:g}"

    def weights(self, mask: Bool[Tensor, "B T"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B T"]:
        return mask.to(dtype)

    def denominator(self, mask: Bool[Tensor, "B T"]) -> float:
        return self.length * float(mask.any(-1).sum())
