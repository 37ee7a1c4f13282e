"""Sums along time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def discounted_future(cost: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """``F_t = sum_{k>=1} gamma^k cost_{t+k}``: what comes after a token, not counting the token itself.

    Only trainable positions count: a masked position has cost 0, consumes no discount step and gets 0 itself (prompts
    and environment tokens neither receive nor pay credit).

    Args:
        cost: per-token cost, any value where masked.
        mask: trainable positions.
        gamma: discount per trainable token, in [0, 1].

    >>> discounted_future(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), 0.5).tolist()
    [[2.0, 2.0, 0.0]]
    """
    if gamma == 0.0:
        return torch.zeros_like(cost)
    cost = cost.where(mask, cost.new_zeros(()))
    if gamma == 1.0:
        inclusive = cost.flip(-1).cumsum(-1).flip(-1)
        return (inclusive - cost).where(mask, cost.new_zeros(()))
    future = torch.zeros_like(cost)
    running = cost.new_zeros(cost.shape[0])
    for t in range(cost.shape[1] - 1, -1, -1):
        future[:, t] = running
        running = torch.where(mask[:, t], gamma * (cost[:, t] + running), running)
    return future.where(mask, cost.new_zeros(()))
