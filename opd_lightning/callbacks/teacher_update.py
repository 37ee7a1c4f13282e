"""TeacherUpdate: when teachers that follow the student move."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from opd_lightning.callbacks.step_monitor import at_step_end
from opd_lightning.module import OPDModule
from opd_lightning.types import Rollout


class TeacherUpdate(pl.Callback):
    """After every optimizer step, lets moving teachers (`EMATeacher`, `PeriodicTeacher`) follow the student.

    Once an optimizer step, however many micro-batches it has, and before anything is measured, saved or written with the new
    weights. The teachers' state is part of the module's checkpoint, so this callback has none. `OPDTrainer` adds it.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        if at_step_end(trainer):
            assert isinstance(pl_module, OPDModule)
            pl_module.after_step()
