"""ColdStart: a first phase on somebody else's completions, inside the same fit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning.module import OPDModule, Phase
from opd_lightning.objectives import ForwardKL, Objective, WrittenToken
from opd_lightning.sources import Source, TeacherSource
from opd_lightning.types import Rollout


class ColdStart(pl.Callback):
    """Trains the first steps from another source with another objective, then hands over to the run's own.

    On-policy distillation starts slowly where student and teacher hardly overlap; some steps on the teacher's text bring the
    student near first ("Rethinking On-Policy Distillation", arXiv 2604.13016, section 4.1). The phase is a function of the
    optimizer step, so a run resumes inside it, at its border or behind it.

    Args:
        steps: length of the phase in optimizer steps, a multiple of rollout.every_n_steps; 0 leaves it out.
        source: who writes in it.
        objective: what it descends; null is the likelihood of the written text.
        reset_optimizer: forget the optimizer's moments when the phase ends.

    Raises:
        ValueError: for a negative number of steps.
    """

    def __init__(
        self,
        steps: int = 0,
        source: Source = TeacherSource(),
        objective: Objective | None = None,
        reset_optimizer: bool = False,
    ) -> None:
        if steps < 0:
            raise ValueError(f"cold_start.steps={steps}: must be at least 0 (0 leaves the cold start out)")
        self.steps, self.source, self.reset_optimizer = steps, source, reset_optimizer
        self.objective = objective or Objective(ForwardKL(), WrittenToken())
        self.over = steps == 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OPDModule)
        if stage == "fit":
            self.announce(pl_module)

    def announce(self, pl_module: OPDModule) -> None:
        """Make the phase known to the module."""
        if self.steps and not pl_module.phases:
            pl_module.phases.append(Phase("cold start", self.steps, self.source, self.objective))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        if self.over or trainer.global_step < self.steps:
            return
        self.over = True
        rank_zero_info(f"cold start over after {self.steps} steps")
        if self.reset_optimizer:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"over": self.over}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.over = state_dict["over"]
