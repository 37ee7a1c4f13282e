"""What `opd resume-drill` puts into a run: a record of what it computes, and an end at a chosen moment."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.callbacks.step_monitor import at_step_end
from opd_lightning.types import Rollout

Way = Literal["SIGKILL", "SIGTERM", "exception"]
MOMENTS = {
    "rollout": "in a rollout",
    "batch": "between rollout and step",
    "accumulation": "between two micro-batches of a step",
    "backward": "in the backward pass",
    "checkpoint": "in a checkpoint write",
    "evaluation": "in an evaluation",
    "refresh": "at a refresh boundary",
}
"""Name -> words."""
UNSHARED = ("time/", "train/step_seconds", "rollout/seconds", "rollout/tokens_per_second", "epoch")
"""Metrics that no two runs share: times, and the epoch, which Lightning counts up where a run was stopped."""


class Interruption(RuntimeError):
    """The exception of a drill."""


def digest(value: Any) -> str:
    """A hash of plain data and tensors that tells every bit apart.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"a": -torch.zeros(2)})
    True
    """
    out = hashlib.blake2b(digest_size=8)

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            whole = item.detach().cpu().contiguous()
            out.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            out.update(whole.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            for key in item:
                out.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        else:
            out.update(repr(item).encode())

    add(value)
    return out.hexdigest()


class Notes(Logger):
    """A logger that notes every metric that it is given, with all bits of a float32 (Lightning's own width)."""

    name, version = "drill", 0

    def __init__(self, note: Callable[[str, str, str], None]) -> None:
        super().__init__()
        self.note = note

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Not noted: they come from the configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            if not key.startswith(UNSHARED):
                self.note("metrics", f"{key} of step {step}", struct.pack(">f", float(value)).hex())


class Drilled(pl.Callback):
    """Notes rollouts, losses and metrics as JSON lines, and ends the run at a moment.

    Args:
        record: file of the notes; every rank adds its number.
        after: optimizer steps that are complete before a moment counts.
        moment: one of `MOMENTS`; null ends nothing.
        way: how the run ends there.
    """

    def __init__(self, record: str, after: int = 0, moment: str | None = None, way: Way = "SIGKILL") -> None:
        if moment is not None and moment not in MOMENTS:
            raise ValueError(f"moment={moment!r}: allowed are {', '.join(MOMENTS)}")
        self.record, self.after, self.moment, self.way = record, after, moment, way
        self._seen: set[str] = set()

    # ---- notes -----------------------------------------------------------------------------------------------------------
    def note(self, what: str, where: str, value: str) -> None:
        """A line of its own, at once: the run may be killed at the next one."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([what, where, value]) + "\n")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trainer = trainer
            self._file = Path(f"{self.record}.{trainer.global_rank}")
            trainer.loggers = [*trainer.loggers, Notes(self.note)]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        self.note("rollouts", f"micro-batch {self._micro_batch}", digest(batch.state()))
        if self._micro_batch % self._buffer.plan.micro_batches == 0:
            self.reach("batch")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        self.note("losses", f"micro-batch {self._micro_batch}", float(outputs["loss"]).hex())
        if not at_step_end(trainer):
            self.reach("accumulation")

    @property
    def _buffer(self) -> Any:
        return next(c for c in self._trainer.callbacks if isinstance(c, RolloutRefresh)).buffer  # type: ignore[attr-defined]

    @property
    def _micro_batch(self) -> int:
        """Number of the one in use, from the beginning of the run."""
        position: int = self._buffer.position - 1
        return position

    # ---- moments ---------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Lay wires where no hook of Lightning's is called."""
        write, refill, save = pl_module.write, self._buffer.refill, trainer.save_checkpoint

        def writing(prompts: Any, who: str, sampler: Any, seeds: Any, on_progress: Any = None) -> Any:
            def progress(done: int) -> None:
                if on_progress is not None:
                    on_progress(done)
                if pl_module.clock.current in ("rollout", "evaluation"):
                    self.reach(pl_module.clock.current)

            return write(prompts, who, sampler, seeds, progress)

        def refilling(refresh: int) -> None:
            self.reach("refresh")
            refill(refresh)

        def saving(path: Any, *args: Any, **kwargs: Any) -> None:
            save(path, *args, **kwargs)
            self.reach("checkpoint", Path(path))

        pl_module.write, self._buffer.refill, trainer.save_checkpoint = writing, refilling, saving  # type: ignore[method-assign, assignment]
        for parameter in pl_module.parameters():
            if parameter.requires_grad:  # the first gradient is there, the others are not
                parameter.register_post_accumulate_grad_hook(lambda _: self.reach("backward"))

    def reach(self, moment: str, file: Path | None = None) -> None:
        """A moment is here: note it once, and end the run if it is the one."""
        if self._trainer.global_step <= self.after or moment in self._seen:
            return
        self._seen.add(moment)
        self.note("moments", moment, "")
        if moment != self.moment:
            return
        if self.way == "SIGTERM":
            if self._trainer.is_global_zero:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if file is not None and file.is_file():  # what a write leaves that is cut off
            os.truncate(file, file.stat().st_size // 2)
        if self.way == "SIGKILL":
            os.killpg(os.getpgid(0), signal.SIGKILL)  # all ranks: a run has a process group of its own
        raise Interruption(f"opd resume-drill ends this run {MOMENTS[moment]}")
