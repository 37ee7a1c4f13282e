"""Means by position in the completion, right under accumulation and several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.ops.positions import sums_by_position


class ByPosition(Metric):
    """Mean of a per-token quantity in bins of equal width along the completion; NaN where a bin saw nothing.

    Args:
        width: positions of a bin, at least 1.
        bins: how many, at least 1; the last one takes what lies beyond it.

    Raises:
        ValueError: for sizes below 1.

    >>> metric = ByPosition(width=2, bins=2)
    >>> metric.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 1, 9])); metric.compute().tolist()
    [2.0, 5.0]
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, width: int, bins: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(width, bins) < 1:
            raise ValueError(f"ByPosition(width={width}, bins={bins}): both must be at least 1")
        self.width, self.bins = width, bins
        self.add_state("sums", torch.zeros(2, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, position: Tensor) -> None:
        self.sums += sums_by_position(values[None], position, self.width, self.bins)[:, 0]

    def compute(self) -> Tensor:
        return (self.sums[0] / self.sums[1]).float()
