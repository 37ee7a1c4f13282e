"""Monitors read the detached statistics of the training step; they never run a model again."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning import parallel
from opd_lightning.metrics import TokenMean
from opd_lightning.types import NOT_A_STUDENT, ObjectiveOutput, Rollout


def at_step_end(trainer: pl.Trainer) -> bool:
    """Whether the last micro-batch closed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class StepMonitor(pl.Callback):
    """Collects per-token values over the micro-batches and ranks of an optimizer step, then logs their means once.

    A subclass says what it collects in `collect`. Means are over tokens: sums and counts are added up, then divided.
    """

    def __init__(self) -> None:
        self.means: dict[str, TokenMean] = {}

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        """Metric key -> per-token (or per-row) values of this micro-batch. The same keys on every rank."""
        raise NotImplementedError

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        """Called with the step's means, after they were logged."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        for key, values in self.collect(outputs["output"], batch).items():
            self.means.setdefault(key, TokenMean(sync_on_compute=False)).update(values.detach().cpu())
        if not at_step_end(trainer):
            return
        keys = list(self.means)
        sums = [float(x) for key in keys for x in (self.means[key].total, self.means[key].count)]
        totals = parallel.sum_over_ranks(sums)
        found = {key: totals[2 * i] / totals[2 * i + 1] for i, key in enumerate(keys) if totals[2 * i + 1]}
        self.means.clear()
        pl_module.log_dict(found, batch_size=1)
        self.on_step(trainer, pl_module, found)


class TrainMonitor(StepMonitor):
    """Loss, reverse KL, importance ratio, staleness, gradient norm, learning rate and time of every optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self._norm = self._rate = 0.0
        self._step = 0
        self._clock = 0.0
        self._spent: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._clock = time.perf_counter()
        self._spent = pl_module.clock.read()

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        age = (self._step - rollout.policy_step).float()
        age = age.masked_fill(rollout.policy_step == NOT_A_STUDENT, torch.nan)
        found = {
            "train/loss": output.token_loss[rollout.mask],
            "train/ratio_deviation": output.stats.values["ratio_deviation"],
            "train/staleness": age,
        }
        return found | {
            f"train/{k}": output.stats.values[k] for k in ("reverse_kl", "k1", "k3", "critic_loss") if k in output.stats.values
        }

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._norm = float(norm)
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step(self, trainer: pl.Trainer, pl_module: Any, values: dict[str, float]) -> None:
        now, spent = time.perf_counter(), pl_module.clock.read()
        phases = {f"time/{name.replace(' ', '_')}": s - self._spent.get(name, 0.0) for name, s in spent.items()}
        self._spent = spent
        found = {
            "train/gradient_norm": self._norm,
            "train/learning_rate": self._rate,
            "train/step_seconds": now - self._clock,
        }
        self._clock = now
        pl_module.log_dict(found | phases, batch_size=1)
