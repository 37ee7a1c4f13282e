"""Sums along time. Only trainable positions count: a masked position has cost 0, consumes no discount step and gets 0 itself
(prompts and environment tokens neither receive nor pay credit).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def _along_trainable(
    fn: Callable[[Float[Tensor, "B T"]], Float[Tensor, "B T"]], values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Apply ``fn`` to the trainable values, moved next to each other at the left of their rows (zeros behind them)."""
    order = (~mask).int().argsort(dim=-1, stable=True)
    done = fn(values.where(mask, values.new_zeros(())).gather(-1, order))
    return torch.zeros_like(values).scatter(-1, order, done).where(mask, values.new_zeros(()))


def backward_scan(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], decay: float) -> Float[Tensor, "B T"]:
    """``A_t = values_t + decay A_{t+1}``.

    >>> backward_scan(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """

    def scan(row: Tensor) -> Tensor:
        if decay == 1.0:
            return row.flip(-1).cumsum(-1).flip(-1)
        out, running = torch.zeros_like(row), row.new_zeros(row.shape[0])
        for t in range(row.shape[1] - 1, -1, -1):
            running = row[:, t] + decay * running
            out[:, t] = running
        return out

    return _along_trainable(scan, values, mask)


def following(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], steps: int = 1) -> Float[Tensor, "B T"]:
    """The value ``steps`` trainable positions later; 0 behind the last.

    >>> following(torch.tensor([[1.0, 9.0, 4.0]]), torch.tensor([[True, False, True]])).tolist()
    [[4.0, 0.0, 0.0]]
    """
    return _along_trainable(lambda row: torch.nn.functional.pad(row[:, steps:], (0, min(steps, row.shape[1]))), values, mask)


def discounted_future(cost: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """``F_t = sum_{k>=1} gamma^k cost_{t+k}``: what comes after a token, not counting the token itself.

    Args:
        cost: per-token cost, any value where masked.
        mask: trainable positions.
        gamma: discount per trainable token, in [0, 1].

    >>> discounted_future(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), 0.5).tolist()
    [[2.0, 2.0, 0.0]]
    """
    return gamma * following(backward_scan(cost, mask, gamma), mask) if gamma else torch.zeros_like(cost)


def windowed_future(cost: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float, steps: int) -> Float[Tensor, "B T"]:
    """``sum_{k=1..steps} gamma^k cost_{t+k}``.

    >>> windowed_future(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), 0.5, 1).tolist()
    [[1.0, 2.0, 0.0]]
    """
    out = torch.zeros_like(cost)
    for k in range(1, min(steps, cost.shape[1]) + 1):
        out = out + gamma**k * following(cost, mask, k)
    return out
