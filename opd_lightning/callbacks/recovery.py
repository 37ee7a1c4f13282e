"""What makes a run survive: random states, checkpoints at optimizer steps, a clean stop, and a guard against NaN."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from opd_lightning import parallel
from opd_lightning.callbacks.step_monitor import at_step_end


class RNGState(pl.Callback):
    """Random states of every rank in the checkpoint; Lightning leaves them out. Dropout continues where it stopped."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        keys: Any = np.random.get_state(legacy=True)
        state = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "python": [version, list(internal), gauss],
            "numpy": [keys[0], keys[1].tolist(), int(keys[2]), int(keys[3]), float(keys[4])],
        }
        return {"ranks": parallel.gather_objects(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is None:
            return
        ranks, self._loaded = self._loaded["ranks"], None
        if len(ranks) != trainer.world_size:
            rank_zero_warn("the number of devices changed: dropout draws new random numbers from here on")
            return
        state = ranks[trainer.global_rank]
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


class OPDCheckpoint(Checkpoint):
    """The newest checkpoints of a run, each written where an optimizer step is complete, and one at its end.

    A file gets its name only when it is whole: a crash or a full disk while writing leaves the previous one. For "the best by
    a metric", add Lightning's ModelCheckpoint beside it (``trainer.callbacks+``).

    Args:
        every_n_steps: optimizer steps between two checkpoints; 0 writes only the last one.
        keep: how many of the newest stay; 0 keeps all.
        folder: below ``trainer.default_root_dir``, or absolute.

    Raises:
        ValueError: for negative numbers.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2, folder: str = "checkpoints") -> None:
        if every_n_steps < 0 or keep < 0:
            raise ValueError(f"OPDCheckpoint(every_n_steps={every_n_steps}, keep={keep}): both must be at least 0")
        self.every_n_steps, self.keep, self.folder = every_n_steps, keep, folder
        self._written = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and at_step_end(trainer) and step % self.every_n_steps == 0 and step != trainer.max_steps:
            self.write(trainer)  # the last step is written in on_train_end, behind the last measurement

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say below the error how to go on."""
        newest = next(iter(checkpoints(Path(trainer.default_root_dir) / self.folder)), None)
        kept = f"its last checkpoint is {newest}: repeat the command with `--ckpt_path last`" if newest else "no checkpoint yet"
        exception.add_note(f"The run ended in optimizer step {trainer.global_step}; {kept}.")
        if trainer.world_size > 1:
            exception.add_note(f"This is rank {trainer.global_rank}; where several ranks fail, the first error is the cause.")

    def write(self, trainer: pl.Trainer) -> Path:
        """Write the current step, unless it stands already. All ranks must call it."""
        target = Path(trainer.default_root_dir) / self.folder / f"step-{trainer.global_step:06d}.ckpt"
        if self._written == trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return target
        if not save_whole(trainer, target):
            return target
        if trainer.is_global_zero:
            for old in checkpoints(target.parent)[self.keep :] if self.keep else ():
                _remove(old)
        trainer.strategy.barrier()
        self._written = trainer.global_step
        return target


def save_whole(trainer: pl.Trainer, target: Path) -> bool:
    """Write a checkpoint that has its name only when it is complete; False, with a warning, if it could not be written."""
    partial = target.with_suffix(".partial")
    try:
        with trainer.lightning_module.clock.phase("checkpoint", whole=True):  # type: ignore[union-attr, operator]
            trainer.save_checkpoint(partial)
        failure = ""
    except (OSError, CheckpointException) as error:  # the latter where every rank writes its part
        failure = str(error)
        trainer.strategy.barrier()  # ranks that did not fail stand at the end of trainer.save_checkpoint
    failures = [f for f in parallel.gather_objects(failure) if f]
    if trainer.is_global_zero:
        if failures:
            _remove(partial)
        else:
            _remove(target)
            os.replace(partial, target)
    trainer.strategy.barrier()
    if failures:
        rank_zero_warn(
            f"the checkpoint of step {trainer.global_step} could not be written ({failures[0]}); the one before it stays"
        )
    return not failures


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that opens; a damaged one is named and passed over."""
    for path in checkpoints(run / "checkpoints"):
        damage = _damage(path / "meta.pt" if path.is_dir() else path)
        if not damage:
            return path
        rank_zero_warn(f"{path} is damaged ({damage}); trying the one before it")
    return None


def _damage(file: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is. All of it is read: torch does not compare checksums."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        return type(error).__name__
    return f"the bytes of {wrong} have changed" if wrong else ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class GracefulStop(pl.Callback):
    """SIGTERM or SIGUSR1: finish the optimizer step, agree over ranks, write a checkpoint, leave with exit code 143.

    Lightning's own handler stops inside an accumulation window and ends with 0.

    Args:
        signals: names of the signals.
    """

    EXIT_CODE = 143

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")) -> None:
        self.signals = signals
        self.requested = self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requested = self.stopped = False
        if threading.current_thread() is threading.main_thread():  # after Lightning registered its own handlers
            for name in self.signals:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True  # nothing else belongs into a signal handler

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer) or self.stopped:
            return
        if parallel.sum_over_ranks([float(self.requested)])[0] > 0:
            self.stopped = True
            trainer.limit_val_batches = 0
            trainer.should_stop = True  # the end of training writes the checkpoint
            rank_zero_info(f"stopping on a signal after step {trainer.global_step}; resume with --ckpt_path last")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()

    def _put_back(self) -> None:
        """Before Lightning puts back what it replaced itself."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class FiniteLoss(pl.Callback):
    """Stops at the first loss that is not finite, on all ranks together, before it reaches the weights."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        bad = parallel.sum_over_ranks([float(not torch.isfinite(loss))])[0]
        if bad:
            raise FloatingPointError(
                f"the loss is not finite at optimizer step {trainer.global_step} on {int(bad)} of {trainer.world_size} ranks. "
                "The weights are untouched; the last checkpoint is good. Lower the learning rate, clip gradients "
                "(trainer.gradient_clip_val), or use a bounded divergence (GeneralizedJSD)."
            )
