"""PositionMap: where in the completion the two models differ, and how that moves as training goes on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning import parallel
from opd_lightning.callbacks.rollout_refresh import RolloutRefresh
from opd_lightning.callbacks.series import Series
from opd_lightning.callbacks.step_monitor import at_step_end
from opd_lightning.ops.positions import sums_by_position
from opd_lightning.types import ObjectiveOutput, Rollout

QUANTITIES = ("student_entropy", "teacher_entropy", "reverse_kl", "overlap", "student_overlap_mass", "teacher_overlap_mass")
"""Statistics of the training step that are binned, where they are measured."""


class PositionMap(pl.Callback):
    """Entropy of both models, reverse KL and top-k agreement (with `AgreementMonitor`) by step and position in the completion,
    in ``<run>/positions.jsonl``: the report's heat maps. Means over tokens, micro-batches and ranks.

    Args:
        bins: along the completion, of equal width, up to the sampler's ``max_new_tokens``.
        lines: at most about so many in a run: each is the mean of ``trainer.max_steps / lines`` steps, at least one. Of a run
            without a known end it keeps every tenth step. 0 keeps nothing.

    Raises:
        ValueError: for bins below 1 or negative lines.
    """

    def __init__(self, bins: int = 24, lines: int = 200) -> None:
        if bins < 1 or lines < 0:
            raise ValueError(f"PositionMap(bins={bins}, lines={lines}): bins must be at least 1, lines at least 0")
        self.bins, self.lines = bins, lines
        self.file = Series("positions.jsonl")
        self.names: list[str] = []
        self.step: Tensor | None = None  # of this rank in this optimizer step: (2, Q, bins)
        self.window: Tensor | None = None  # of all ranks since the last line

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.lines:
            self.file.begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        if not self.lines:
            return
        output: ObjectiveOutput = outputs["output"]
        found = output.stats.values
        names = [name for name in QUANTITIES if name in found]
        if names != self.names:  # another phase measures other things
            self.names, self.step, self.window = names, None, None
        if not names:
            return
        width = self._width(trainer)
        values = torch.stack([found[name].float() for name in names])
        sums = sums_by_position(values, output.stats.position, width, self.bins)
        self.step = sums if self.step is None else self.step + sums
        if not at_step_end(trainer):
            return
        total = torch.tensor(parallel.sum_over_ranks(self.step.flatten().tolist()), dtype=torch.float64).view_as(sums)
        self.window = total if self.window is None else self.window + total
        self.step = None
        every = -(-trainer.max_steps // self.lines) if trainer.max_steps > 0 else 10
        if trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps:
            means, count = self.window[0] / self.window[1], self.window[1, 0]
            line = {"step": trainer.global_step, "steps": every, "width": width, "count": [int(n) for n in count.tolist()]}
            self.file.add(trainer, [line | {name: _short(row) for name, row in zip(names, means, strict=True)}])
            self.window = None

    def _width(self, trainer: pl.Trainer) -> int:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        longest = next((c.sampler.max_new_tokens for c in callbacks if isinstance(c, RolloutRefresh)), 1)
        return max(1, -(-longest // self.bins))

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "window": self.window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.names, self.window = list(state_dict["names"]), state_dict["window"]


def _short(values: Tensor) -> list[float | None]:
    """Four digits; None for bins without a token."""
    return [float(f"{x:.4g}") if x == x else None for x in values.tolist()]
