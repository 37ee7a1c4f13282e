"""The alignment rule and the masks that follow from it.

Position ``t`` of every ``(B, T)`` tensor scores the token ``ids[:, t + 1]``, so ``T = L - 1``. This module is the only
place of the package that shifts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def targets(ids: Int[Tensor, "B L"]) -> Int[Tensor, "B T"]:
    """The token that each position scores.

    >>> targets(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7]]
    """
    return ids[:, 1:]


def completion_mask(
    prompt_lengths: Int[Tensor, " B"], completion_lengths: Int[Tensor, " B"], length: int
) -> Bool[Tensor, "B T"]:
    """True where the target is a completion token, for right-padded rows of ``length`` tokens.

    >>> completion_mask(torch.tensor([2]), torch.tensor([2]), 5).int().tolist()
    [[0, 1, 1, 0]]
    """
    target_index = torch.arange(1, length, device=prompt_lengths.device)
    start = prompt_lengths[:, None]
    return (target_index >= start) & (target_index < start + completion_lengths[:, None])


def flatten_completions(states: Shaped[Tensor, "B L *rest"], mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, N * rest]:
    """The states that predict completion tokens, row by row: ``states[b, t]`` predicts ``ids[b, t + 1]``.

    Two renderings of one completion (say, behind a student prompt and behind a longer teacher prompt) flatten to the
    same order, which is how student and teacher are joined whatever their prompts are.
    """
    return states[:, :-1][mask]


def unflatten_completions(flat: Shaped[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """Put flat per-token values back to their positions; zero elsewhere. Differentiable.

    >>> unflatten_completions(torch.tensor([1.0, 2.0]), torch.tensor([[False, True, True]])).tolist()
    [[0.0, 1.0, 2.0]]
    """
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def masked_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over the mask. A masked value may be NaN or infinite: it is never multiplied.

    >>> masked_sum(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]])).item()
    1.0
    """
    return values.where(mask, values.new_zeros(())).sum()


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over the mask; 0 where the mask is empty.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).item()
    2.0
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)
