"""ColdStart: a first phase on somebody else's completions, inside the same fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning.callbacks.pairing import refuse_incomparable
from opd_lightning.callbacks.readiness import Readiness
from opd_lightning.callbacks.rollout_refresh import BeforeRefresh, RolloutRefresh
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ForwardKL, Objective, WrittenToken
from opd_lightning.sources import Phase, Source, TeacherSource
from opd_lightning.types import Rollout

NAME = "cold start"


class ColdStart(BeforeRefresh):
    """Trains the first steps from another source with another objective, then hands over to the run's own.

    On-policy distillation starts slowly where student and teacher hardly overlap; some steps on the teacher's text bring the
    student near first ("Rethinking On-Policy Distillation", arXiv 2604.13016, section 4.1). With `until`, the phase is entered
    only if the student is not near yet, and ends by itself. Where it ends is part of the checkpoint, so a run resumes inside
    it, at its border or behind it.

    Args:
        steps: length of the phase in optimizer steps, a multiple of rollout.every_n_steps; 0 leaves it out. With `until`, the
            most that it may take.
        source: who writes in it; `GradedTeacher` keeps only what the grader accepts, and keeps it on disk.
        objective: what it descends; null is the likelihood of the written text.
        reset_optimizer: forget the optimizer's moments when the phase ends.
        until: when the student is near enough; null trains all of `steps`.

    Raises:
        ValueError: for a negative number of steps.
    """

    def __init__(
        self,
        steps: int = 0,
        source: Source = TeacherSource(),
        objective: Objective | None = None,
        reset_optimizer: bool = False,
        until: Readiness | None = None,
    ) -> None:
        if steps < 0:
            raise ValueError(f"cold_start.steps={steps}: must be at least 0 (0 leaves the cold start out)")
        self.steps, self.until, self.source, self.reset_optimizer = steps, until, source, reset_optimizer
        self.objective = objective or Objective(ForwardKL(), WrittenToken())
        self.over = steps == 0
        self.end = steps
        self.held = 0  # looks in a row at which the student was near enough
        self.history: list[dict[str, float]] = []
        self._looked = -1
        self._phases: list[Phase] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OPDModule)
        if stage == "fit":
            self.announce(pl_module)

    def announce(self, pl_module: OPDModule) -> None:
        """Make the phase known to the module."""
        if self.steps and self.until is not None:
            refuse_incomparable(pl_module.teacher, "cold_start.until")
        if self.steps and not pl_module.phases:
            pl_module.phases.append(Phase(NAME, self.end, self.source, self.objective))
        self._phases = pl_module.phases

    # ---- by itself -----------------------------------------------------------------------------------------------------
    def before_refresh(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Look at the student, if it is time, before anybody writes for this step; all ranks come here together."""
        if self.until is None or step >= self.end or step <= self._looked or step % self.until.every_n_steps:
            return
        self._looked = step
        (rollout,) = (c for c in trainer.callbacks if isinstance(c, RolloutRefresh))  # type: ignore[attr-defined]
        with pl_module.clock.phase("readiness", whole=True):
            found = self.until.measure(trainer, pl_module, rollout.sampler, rollout.seed)
        self.history.append({"step": float(step), **found.to_dict()})
        for logger in trainer.loggers:
            logger.log_metrics({f"cold_start/{key}": value for key, value in found.to_dict().items()}, step=step)
        lacking = self.until.lacking(found, entering=step == 0)
        self.held = 0 if lacking else self.held + 1
        if step == 0 and not lacking:
            self._finish(0, f"cold start left out: {found}")
        elif step > 0 and self.held >= self.until.patience:
            self._finish(step, f"cold start over after {step} steps: {found}")
        elif step == 0:
            rank_zero_info(f"cold start of at most {self.steps} steps: {', '.join(lacking)}")

    def _finish(self, step: int, why: str) -> None:
        self._end_at(step)
        rank_zero_info(why)

    def _end_at(self, step: int) -> None:
        self.end = step
        self._phases[:] = [replace(p, end=step) if p.name == NAME else p for p in self._phases]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        if self.over or trainer.global_step < self.end:
            return
        self.over = True
        if self.until is None or self.end == self.steps:
            rank_zero_info(f"cold start over after {self.steps} steps{', the most that it may take' if self.until else ''}")
        if self.reset_optimizer and self.end:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    # ---- state -----------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"over": self.over, "end": self.end, "held": self.held, "looked": self._looked, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.over = state_dict["over"]
        self.held, self._looked = state_dict.get("held", 0), state_dict.get("looked", -1)
        self.history = state_dict.get("history", [])
        if self.until is not None:
            self._end_at(state_dict.get("end", self.steps))
