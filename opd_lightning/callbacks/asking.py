"""Asking the teacher ahead, where a run may wait: a server that goes away pauses the run instead of ending it."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from opd_lightning import parallel
from opd_lightning.callbacks.recovery import GracefulStop, OPDCheckpoint
from opd_lightning.endpoint import Unreachable
from opd_lightning.types import Rollout

POLL = 1.0
"""Seconds between two attempts, each with retries of its own."""

SAY_EVERY = 60.0
"""Seconds between two lines that say that a run still waits."""


class TeacherAway(RuntimeError):
    """The teacher server did not come back in time, or a signal ended the wait. The run can be resumed.

    Attributes:
        code: exit code of the process: 75 (a temporary failure, sysexits.h), or that of a stop on a signal.
    """

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


def ask_ahead(trainer: pl.Trainer, module: Any, rollout: Rollout, save: bool = False) -> None:
    """Let the teacher prepare its answers to this rank's rows. All ranks call it; all wait while one of them has to.

    Args:
        trainer: of the run.
        module: an `OPDModule`.
        rollout: what the teacher will be asked.
        save: write a checkpoint when the wait begins. Only between optimizer steps, with all that belongs to the last one done.

    Raises:
        TeacherAway: after the teacher's patience, or on a signal that asks the run to stop.
    """
    if module.teacher.known is None:
        return
    started: float | None = None
    said = 0.0
    while True:
        problem = ""
        try:
            module.teacher.prepare(rollout.for_teacher)
        except Unreachable as error:
            problem = str(error)
        problems = [p for p in parallel.gather_objects(problem) if p]
        now = time.monotonic()
        if not problems:
            if started is not None:
                rank_zero_info(f"the teacher server is back after {now - started:.0f} s")
            return
        if started is None:
            started = said = now
            kept = _save(trainer) if save else ""
            patience = _patience(module.teacher)
            rank_zero_warn(f"{problems[0]}. {kept}The run waits for it, up to {patience:.0f} s (model.teacher.patience)")
        elif now - said >= SAY_EVERY:
            said = now
            rank_zero_info(f"still waiting for the teacher server ({now - started:.0f} s): {problems[0]}")
        stop = next((c for c in trainer.callbacks if isinstance(c, GracefulStop)), None)  # type: ignore[attr-defined]
        asked_to, over = stop is not None and stop.requested, now - started >= patience
        if any(parallel.sum_over_ranks([float(asked_to), float(over)])):
            why = "a signal asked the run to stop" if asked_to else f"waited {now - started:.0f} s in vain"
            raise TeacherAway(
                f"the teacher server is away ({problems[0]}); {why}. Start it again and go on with --ckpt_path last",
                GracefulStop.EXIT_CODE if asked_to else 75,
            )
        time.sleep(POLL)


def _patience(teacher: Any) -> float:
    return max(getattr(leaf, "patience", 0.0) for leaf in teacher.leaves().values())


def _save(trainer: pl.Trainer) -> str:
    """Write what is done so far, if the run keeps checkpoints, and say so."""
    writer = next((c for c in trainer.callbacks if isinstance(c, OPDCheckpoint)), None)  # type: ignore[attr-defined]
    if writer is None or trainer.global_step == 0:
        return ""
    return f"Step {trainer.global_step} is saved. " if writer.write(trainer).exists() else ""
