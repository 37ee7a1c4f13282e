"""AgreementMonitor: do student and teacher prefer the same tokens on the student's states?"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning.callbacks.step_monitor import StepMonitor
from opd_lightning.module import OPDModule
from opd_lightning.types import ObjectiveOutput, Rollout

KEYS = (
    *("overlap", "student_overlap_mass", "teacher_overlap_mass", "overlap_advantage"),
    *("student_top_mass", "teacher_top_mass", "student_reach", "teacher_reach"),
)


class AgreementMonitor(StepMonitor):
    """Logs top-k overlap, probability on the overlap and on each model's own top-k, overlap-token advantage and entropy gap
    (arXiv 2604.13016); what the student gives to the tokens that the teacher wants, and to whom suppressed mass leaks.

    What separates runs that succeed from runs that fail is whether the overlap rises, not where it starts.

    Args:
        k: size of the top-k sets; independent of the objective's support.

    Raises:
        ValueError: for k < 1.
    """

    def __init__(self, k: int = 16) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"AgreementMonitor(k={k}): k must be at least 1")
        self.k = k

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OPDModule)
        pl_module.agreement_k = self.k

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        values = output.stats.values
        found = {f"train/{key}": values[key] for key in KEYS if key in values}
        if "leak" in values:  # of suppressed tokens alone
            found["train/leak"] = values["leak"].where(values["k1"] > 0.0, torch.nan)
        if "teacher_entropy" in values:
            found["train/entropy_gap"] = (values["teacher_entropy"] - values["student_entropy"]).abs()
        return found
