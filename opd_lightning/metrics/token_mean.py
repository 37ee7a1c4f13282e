"""Means that are right under accumulation and several ranks: sums and counts travel, the division comes last."""

from __future__ import annotations

from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Mean over tokens, across updates and ranks. NaN marks a token that has no value and is not counted.

    >>> mean = TokenMean()
    >>> mean.update(torch.tensor([1.0, 3.0])); mean.update(torch.tensor([float("nan"), 5.0]))
    >>> mean.compute().item()
    3.0
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        known = ~values.isnan()
        self.total += values.where(known, values.new_zeros(())).sum(dtype=torch.float64)
        self.count += known.sum()

    def compute(self) -> Tensor:
        """NaN if nothing was counted."""
        return (self.total / self.count).float()


class PassAtK(Metric):
    """Probability that at least one of k of a prompt's n completions is right: ``1 - C(n - c, k) / C(n, k)``.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), averaged over prompts.

    Args:
        k: completions looked at.

    >>> metric = PassAtK(k=1)
    >>> metric.update(correct=1, total=4); metric.compute().item()
    0.25
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"PassAtK(k={k}): k must be at least 1")
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correct: int, total: int) -> None:
        if total < self.k:
            raise ValueError(f"pass@{self.k} needs at least {self.k} completions a prompt, got {total}")
        self.total += 1.0 - comb(total - correct, self.k) / comb(total, self.k)
        self.count += 1

    def compute(self) -> Tensor:
        return (self.total / self.count).float()
