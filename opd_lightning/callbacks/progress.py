"""Progress of steps and of rollouts, in one bar each, and where the time went."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

SHOWN = {"train/loss": "loss", "train/reverse_kl": "kl", "rollout/completion_tokens": "len", "eval/accuracy": "acc"}


class OPDProgressBar(TQDMProgressBar):
    """A bar over optimizer steps, and a second one while completions are written.

    Args:
        refresh_rate: micro-batches between two updates.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._writing: Any = None

    def init_train_tqdm(self) -> Any:
        return Tqdm(
            desc="Training",
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            unit="step",
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def init_validation_tqdm(self) -> Any:
        """Hidden: `CompletionEval` does the work of a validation and shows it through `show_writing`."""
        return Tqdm(disable=True, file=sys.stderr)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.train_progress_bar.reset(total=max(trainer.max_steps, 0) or None)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description("Training")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate() and not self.is_disabled:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float]:  # type: ignore[override]
        found = trainer.callback_metrics
        return {short: f"{float(found[key]):.3g}" for key, short in SHOWN.items() if key in found}

    def show_writing(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` completions are written."""
        if self.is_disabled:
            return
        if self._writing is None:
            self._writing = Tqdm(
                total=total, position=2 * self.process_position + 1, leave=False, dynamic_ncols=True, file=sys.stderr
            )
        self._writing.total = total
        self._writing.n = done
        self._writing.set_description(what)
        if done >= total:
            self._writing.close()
            self._writing = None


class TimeTable(pl.Callback):
    """Where the time of a fit went, as a table at its end."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.clock.restart()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            print(time_table(pl_module.clock.read()))


def time_table(seconds: dict[str, float]) -> str:
    """Phases by size, with their shares.

    >>> print(time_table({"rollout": 3.0, "other": 1.0}))
    time             seconds   share
    rollout              3.0    75 %
    other                1.0    25 %
    """
    total = max(sum(seconds.values()), 1e-9)
    rows = sorted(seconds.items(), key=lambda item: -item[1])
    lines = [f"{name:16} {s:7.1f} {100 * s / total:5.0f} %" for name, s in rows]
    return "\n".join([f"{'time':16} seconds   share", *lines])
