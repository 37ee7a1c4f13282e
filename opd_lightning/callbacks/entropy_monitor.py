"""EntropyMonitor: is the student still a distribution?"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from opd_lightning.callbacks.step_monitor import StepMonitor
from opd_lightning.types import ObjectiveOutput, Rollout


class EntropyMonitor(StepMonitor):
    """Logs the entropy of student and teacher, over the completion and by position, and watches a floor.

    A student whose entropy falls to 0 writes one completion per prompt and learns nothing from the next ones.

    Args:
        edges: upper edges of the position buckets, in completion tokens; the last bucket is open. Empty logs no buckets.
        floor: student entropy in nats per token below which the monitor acts; 0 never does.
        patience: optimizer steps in a row below the floor before it acts.
        action: ``warn`` once per fall, or ``stop`` the run (its checkpoint is written as usual).

    Raises:
        ValueError: for edges that do not increase, or an unknown action.
    """

    def __init__(self, edges: list[int] | None = None, floor: float = 0.0, patience: int = 5, action: str = "warn") -> None:
        super().__init__()
        self.edges = edges if edges is not None else []
        if self.edges != sorted(set(self.edges)) or any(e < 1 for e in self.edges):
            raise ValueError(f"EntropyMonitor(edges={edges}): edges must be positive and increase")
        if action not in ("warn", "stop"):
            raise ValueError(f"EntropyMonitor(action={action!r}): allowed are 'warn' and 'stop'")
        self.floor, self.patience, self.action = floor, patience, action
        self.below = 0

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        found = {}
        for who in ("student", "teacher"):
            values = output.stats.values.get(f"{who}_entropy")
            if values is None:
                continue
            found[f"train/{who}_entropy"] = values
            lows, highs = [0, *self.edges], [*self.edges, None]
            for low, high in zip(lows, highs, strict=True) if self.edges else ():
                inside = output.stats.position >= low
                if high is not None:
                    inside &= output.stats.position < high
                found[f"train/{who}_entropy/{low}-{'' if high is None else high - 1}"] = values[inside]
        return found

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        entropy = values["train/student_entropy"]
        self.below = self.below + 1 if entropy < self.floor else 0
        if self.below != self.patience:
            return
        rank_zero_warn(
            f"student entropy has been below {self.floor} nats for {self.patience} steps (now {entropy:.4f} at step "
            f"{trainer.global_step}): the student is collapsing. Lower the learning rate, or look at the rollouts."
        )
        if self.action == "stop":
            trainer.should_stop = True
