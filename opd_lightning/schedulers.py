"""Learning rates over a run, as schedulers that YAML can name."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmupDecay"]


class WarmupDecay(LambdaLR):
    """Linear warm-up, then constant, linear or cosine decay; a function of the optimizer step.

    Args:
        optimizer: given by the module.
        warmup_steps: steps until the full rate.
        total_steps: end of the decay; needed unless the shape is constant.
        shape: ``constant``, ``linear`` or ``cosine``.
        final: rate at the end, as a share of the full one.

    Raises:
        ValueError: for a decay without its end, or an unknown shape.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        total_steps: int = 0,
        shape: Literal["constant", "linear", "cosine"] = "constant",
        final: float = 0.0,
    ) -> None:
        if shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"WarmupDecay(shape={shape!r}): allowed are constant, linear and cosine")
        if shape != "constant" and total_steps <= warmup_steps:
            raise ValueError(f"WarmupDecay(total_steps={total_steps}): a {shape} decay must end after the warm-up")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            if shape == "constant":
                return 1.0
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            left = 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
            return final + (1.0 - final) * left

        super().__init__(optimizer, factor)
