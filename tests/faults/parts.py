"""Parts of a run that fail once, when they are told to: a file, named by `FAULT`, says which, and from which step on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.metrics import Grader
from opd_lightning.models import FrozenTeacher
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import TokenLaws

FAULT = "OPD_TEST_FAULT"
TOO_LONG = 16_384
"""Bytes of the longest file that a full disk still takes."""


class Now:
    """The step that the run is in."""

    step = -1


def fails(name: str) -> bool:
    """Whether this is the moment of a fault. It happens once: a resumed run is sound."""
    order = Path(os.environ.get(FAULT, "none"))
    if not order.is_file():
        return False
    which, step = order.read_text().split(",")
    if which != name or Now.step < int(step):
        return False
    order.unlink()
    return True


class Judge(Grader):
    """A grader that fails."""

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        if fails("grader"):
            raise ZeroDivisionError("the grader divided by the length of nothing")
        return float(len(completion) % 2)


class Sampler(NativeSampler):
    """A rollout engine that fails."""

    def write(self, *args: Any) -> Any:
        if fails("sampler"):
            raise RuntimeError("the rollout engine ran out of memory")
        return super().write(*args)


class Teacher(FrozenTeacher):
    """A teacher that fails."""

    def laws(self, *args: Any) -> TokenLaws:
        if fails("teacher"):
            raise ConnectionError("the teacher does not answer")
        return super().laws(*args)


class Misfortune(pl.Callback):
    """Everything else that happens to a run."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        Now.step = trainer.global_step
        run = Path(trainer.default_root_dir)
        if fails("callback"):
            raise KeyError("a callback of the user's own")
        if fails("logger folder"):
            shutil.rmtree(run / "logs")
        if trainer.global_rank == 1 and fails("rank"):
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.is_global_zero and fails("full disk"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_LONG, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
        if parallel.rank() == parallel.world_size() - 1 and fails("loss"):
            loss.data.fill_(torch.nan)  # seen by every callback behind this one

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if fails("gradient"):
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        Now.step = -1
