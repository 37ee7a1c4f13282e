"""Progress of steps and of rollouts, in one bar each."""

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
