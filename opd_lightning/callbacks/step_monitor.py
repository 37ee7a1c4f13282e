"""Monitors read the detached statistics of the training step; they never run a model again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning import parallel
from opd_lightning.types import NOT_A_STUDENT, ObjectiveOutput, Rollout

MEANS = (
    "reverse_kl",
    "coarse_reverse_kl",
    "k1",
    "k3",
    "student_entropy",
    "teacher_entropy",
    "critic_loss",
    "matched_student_mass",
    "matched_teacher_mass",
)
OUTLIER = 10.0
"""Nats between the two log-probabilities of a drawn token from which on its signal counts as an outlier. Our choice: one of
them gives the token less than a twenty-thousandth of what the other does."""


def at_step_end(trainer: pl.Trainer) -> bool:
    """Whether the last micro-batch closed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class Logging(pl.Callback):
    """A callback whose logged values others may read.

    Attributes:
        logged: what was logged at the end of the last optimizer step, equal on all ranks; empty if nothing was.
    """

    logged: Mapping[str, float] = MappingProxyType({})


def logged_at_step(trainer: pl.Trainer) -> dict[str, float]:
    """Everything that was logged at the end of this optimizer step, for callbacks that come after the monitors."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {key: value for c in callbacks if isinstance(c, Logging) for key, value in c.logged.items()}


def log_numbers(pl_module: pl.LightningModule, values: Mapping[str, float | Tensor]) -> None:
    """What ``pl_module.log_dict(values, batch_size=1)`` does, for values that are logged at every step.

    Lightning moves a value's record to its device, copying it field by field, each time the value is logged: 0.15 ms a value,
    of which a step has dozens. From the second time on only the record's value is set here.
    """
    results, fresh = pl_module.trainer._results, {}
    for name, value in values.items():
        key = f"{pl_module._current_fx_name}.{name}"
        if results is not None and key in results:
            number = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            results.update_metrics(key, number.to(pl_module.device), 1)
        else:
            fresh[name] = value
    if fresh:
        pl_module.log_dict(fresh, batch_size=1)


class StepMonitor(Logging):
    """Collects per-token values over the micro-batches and ranks of an optimizer step, then logs their means once.

    A subclass says what it collects in `collect`. Means are over tokens: sums and counts are added up, then divided. NaN marks
    a token that has no value.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        """Metric key -> per-token (or per-row) values of this micro-batch. The same keys on every rank."""
        raise NotImplementedError

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, made of the step's means."""
        return means

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        """Called with the step's means, after they were logged."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        for key, (total, count) in _sums(self.collect(outputs["output"], batch)).items():
            before = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = before[0] + total, before[1] + count
        if not at_step_end(trainer):
            return
        keys = list(self.sums)
        totals = parallel.sum_over_ranks([x for key in keys for x in self.sums[key]])
        self.sums.clear()
        means = {key: totals[2 * i] / totals[2 * i + 1] for i, key in enumerate(keys) if totals[2 * i + 1]}
        found = self.derive(means)
        self.logged = found
        log_numbers(pl_module, found)
        self.on_step(trainer, pl_module, found)


def _sums(found: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Sum and number of the values that are known, with one transfer from the device for all keys."""
    if not found:
        return {}
    rows = []
    for values in found.values():
        known = values.detach().cpu() if values.device.type == "mps" else values.detach()  # which has no float64
        rows += [known.nansum(dtype=torch.float64), (~known.isnan()).sum(dtype=torch.float64)]
    flat = torch.stack(rows).tolist()
    return {key: (flat[2 * i], flat[2 * i + 1]) for i, key in enumerate(found)}


class TrainMonitor(StepMonitor):
    """Loss, reverse KL, entropies, signal, importance ratio, staleness, gradient norm, learning rate and time of every
    optimizer step. A gradient that is not finite ends the run before it reaches the weights.
    """

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
        stats = output.stats.values
        found = {
            "train/loss": output.token_loss[rollout.mask],
            "train/ratio_deviation": stats["ratio_deviation"],
            "train/staleness": age,
            "ratio": stats["ratio"],
            "ratio_squared": stats["ratio"].square(),
        }
        if "k1" in stats:
            cost = stats["k1"]  # minus the signal of the drawn token
            found |= {
                "train/neg_frac": (cost > 0.0).to(cost.dtype),
                "train/suppressed": cost.clamp(min=0.0),
                "train/raised": (-cost).clamp(min=0.0),
                "train/signal_outliers": (cost.abs() > OUTLIER).to(cost.dtype),
            }
        return found | {f"train/{k}": stats[k] for k in MEANS if k in stats}

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        first, second = means.pop("ratio", None), means.pop("ratio_squared", None)
        if first is not None and second:
            means["train/effective_sample"] = first**2 / second
        return means

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        with pl_module.clock.phase("optimizer"):  # clipping needs it
            sharded = pl_module if parallel.is_sharded(trainer.strategy) else None
            self._norm = pl_module.gradient_norm = parallel.gradient_norm(optimizer, sharded)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # which skips such steps itself
        if not math.isfinite(self._norm) and not scaled:
            raise FloatingPointError(
                f"the gradient is not finite at optimizer step {trainer.global_step}, though its loss is. The weights are "
                "untouched; the last checkpoint is good. A term of the objective has no finite derivative there: use a bounded "
                "divergence (GeneralizedJSD), or a lower learning rate if the weights have grown."
            )
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
        self.logged = {**self.logged, **found}
        log_numbers(pl_module, found | phases)
