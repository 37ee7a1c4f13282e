"""Sums of per-token values by their place in the completion."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sums_by_position(
    values: Float[Tensor, "Q N"], position: Int[Tensor, " N"], width: int, bins: int
) -> Float[Tensor, "2 Q bins"]:
    """Sum and number of known values in bins of equal width; the last bin takes what lies beyond it. NaN is not counted.

    Args:
        values: Q quantities at N tokens.
        position: index within the completion, from 0.
        width: positions of a bin.
        bins: how many.

    >>> sums_by_position(torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([0, 1, 9]), width=2, bins=2).tolist()
    [[[4.0, 5.0]], [[2.0, 1.0]]]
    """
    if values.device.type == "mps":  # which has no float64
        values, position = values.cpu(), position.cpu()
    values = values.detach().double()
    known = ~values.isnan()
    place = (position // width).clamp(max=bins - 1)
    both = torch.stack([values.where(known, 0.0), known.double()])
    return both.new_zeros(2, len(values), bins).index_add_(-1, place, both)
