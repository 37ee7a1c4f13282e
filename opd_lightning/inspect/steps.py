"""A fit that hands over after every optimizer step: the real Trainer, in a loop of one's own."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning.callbacks import TokenRecords
from opd_lightning.callbacks.step_monitor import at_step_end, logged_at_step
from opd_lightning.callbacks.token_records import Record, records, watch
from opd_lightning.module import OPDModule
from opd_lightning.ops.masks import unflatten_completions
from opd_lightning.types import ObjectiveOutput, Rollout

LONGEST = 512
"""Tokens of a rollout that are shown."""
KINDS = {
    "advantage": "advantage of the drawn token, nats: red is pushed down, blue is pulled up",
    "reverse_kl": "KL(student ‖ teacher) at this place, nats",
    "student_entropy": "entropy of the student's law, nats",
    "teacher_entropy": "entropy of the teacher's law, nats",
    "loss": "what the token adds to the loss before the reduction",
}
SIGNED = ("advantage", "loss")


@dataclass(frozen=True)
class Step:
    """One finished optimizer step. In a notebook it shows its rollouts, coloured.

    Attributes:
        number: from 1.
        module: the student is the one after this step.
        parts: the step's micro-batches and what the objective said about them.
        metrics: what was logged, by key.
        shown: rollouts that `show` prints.
    """

    number: int
    module: OPDModule
    parts: Sequence[tuple[Rollout, ObjectiveOutput]]
    metrics: dict[str, float]
    shown: int = 4

    @cached_property
    def rollouts(self) -> Rollout:
        """Everything that was trained on in this step; (B, T) tensors below have its rows and positions."""
        return Rollout.cat([rollout for rollout, _ in self.parts])

    def values(self, name: str) -> Tensor:
        """(B, T) a statistic of the training step, NaN outside the completions.

        Raises:
            KeyError: naming those that there are.
        """
        width = self.rollouts.mask.shape[1]
        rows = []
        for rollout, output in self.parts:
            if name not in output.stats.values:
                raise KeyError(f"no statistic {name!r} in this step: there are {', '.join(sorted(output.stats.values))}")
            flat = output.stats.values[name].float()
            spread = unflatten_completions(flat, rollout.mask).where(rollout.mask, torch.nan)
            rows.append(torch.nn.functional.pad(spread, (0, width - spread.shape[1]), value=torch.nan))
        return torch.cat(rows)

    @property
    def advantage(self) -> Tensor:
        """(B, T) of the drawn token, NaN outside: the objective's own where it samples; elsewhere the teacher's minus the
        student's log-probability.
        """
        own = all("advantage" in output.stats.values for _, output in self.parts)
        return self.values("advantage") if own else -self.values("k1")

    @property
    def loss(self) -> Tensor:
        """(B, T) what each token adds before the reduction, NaN outside."""
        width = self.rollouts.mask.shape[1]
        rows = [output.token_loss.where(rollout.mask, torch.nan) for rollout, output in self.parts]
        return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=torch.nan) for row in rows])

    @cached_property
    def records(self) -> list[Record]:
        """Its rollouts token by token, with both models' likeliest tokens (see `TokenRecords`)."""
        vocabulary = self.module.vocabulary
        return [r for rollout, out in self.parts for r in records(vocabulary, rollout, out, list(range(len(rollout))), LONGEST)]

    def show(self, color: str = "advantage", rows: int | None = None) -> None:
        """Its rollouts with coloured tokens; in a notebook, pointing at one shows what both models prefer there.

        Args:
            color: ``advantage``, ``reverse_kl``, ``student_entropy``, ``teacher_entropy`` or ``loss``.
            rows: how many rollouts; null takes `shown`.

        Raises:
            ValueError: for an unknown colour.
        """
        text = coloured(self.records[: rows or self.shown], color)
        try:
            from IPython.core.getipython import get_ipython
            from IPython.display import HTML, display
        except ImportError:
            print(self)
            return
        if get_ipython() is None:
            print(self)
        else:
            display(HTML(f"<div>{html.escape(self.summary)}</div>{text}"))

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(self.summary)}</div>{coloured(self.records[: self.shown], 'advantage')}"

    @property
    def summary(self) -> str:
        """One line."""
        keys = {"loss": "train/loss", "reverse KL": "train/reverse_kl", "student entropy": "train/student_entropy"}
        found = [f"{name} {self.metrics[key]:.4f}" for name, key in keys.items() if key in self.metrics]
        return f"step {self.number}: {', '.join([f'{len(self.rollouts)} rollouts', *found])}"

    def __repr__(self) -> str:
        lines = [f"  {r['prompt']} -> {r['completion']}" for r in self.records[: self.shown]]
        return "\n".join([self.summary, *lines])


def coloured(found: Sequence[Record], color: str) -> str:
    """Token records as HTML that needs no script.

    Raises:
        ValueError: for an unknown colour.
    """
    if color not in KINDS:
        raise ValueError(f"color={color!r}: allowed are {', '.join(KINDS)}")
    values = [_values(record, color) for record in found]
    sizes = sorted(abs(x) for row in values for x in row if x is not None)
    top = (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0
    rows = []
    for record, row in zip(found, values, strict=True):
        tokens = "".join(_token(record, i, value, color, top) for i, value in enumerate(row))
        rows.append(
            '<div style="font-family:monospace;white-space:pre-wrap;line-height:1.9;margin:.3em 0">'
            f'<span style="opacity:.6">{html.escape(record["prompt"])}</span>{tokens}</div>'
        )
    return f"{''.join(rows)}<small>{KINDS[color]}; strongest at ±{top:.3g}</small>"


def _values(record: Record, color: str) -> list[float | None]:
    if color == "advantage" and "advantage" not in record:
        theirs = record.get("teacher_logprob") or [None] * len(record["ids"])
        return [None if q is None or p is None else q - p for p, q in zip(record["logprob"], theirs, strict=True)]
    found: list[float | None] = record.get(color) or [None] * len(record["ids"])
    return found


def _token(record: Record, i: int, value: float | None, color: str, top: float) -> str:
    piece = record["pieces"][str(record["ids"][i])].replace("\n", "⏎\n")
    tint = "230,140,0" if color not in SIGNED else "222,60,50" if (value or 0.0) < 0.0 else "30,120,230"
    strength = 0.0 if value is None else 0.72 * min(abs(value) / top, 1.0)
    lines = [f"{color.replace('_', ' ')} {value:.3g}"] if value is not None else []
    for who in ("student", "teacher"):
        if f"{who}_top" in record:
            pairs = zip(record[f"{who}_top"][i], record[f"{who}_top_probs"][i], strict=True)
            lines.append(f"{who}: " + ", ".join(f"{record['pieces'][str(v)]!r} {100 * p:.3g} %" for v, p in pairs))
    title = html.escape("\n".join(lines))
    return f'<span title="{title}" style="background:rgba({tint},{strength:.2f})">{html.escape(piece)}</span>'


class _Handover(pl.Callback):
    """Gives every finished step to another thread and waits until it is given back."""

    def __init__(self, k: int, shown: int) -> None:
        self.k, self.shown = k, shown
        self.parts: list[tuple[Rollout, ObjectiveOutput]] = []
        self.steps: queue.Queue[Step | None] = queue.Queue()
        self.go = threading.Semaphore(0)
        self.stop = False
        self.error: BaseException | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        assert isinstance(pl_module, OPDModule)
        pl_module.watch = watch(batch, list(range(len(batch))), self.k)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OPDModule)
        pl_module.watch = None
        self.parts.append((batch, outputs["output"]))
        if not at_step_end(trainer):
            return
        self.steps.put(Step(trainer.global_step, pl_module, self.parts, logged_at_step(trainer), self.shown))
        self.parts = []
        self.go.acquire()
        if self.stop:
            trainer.should_stop = True


def walk(trainer: pl.Trainer, module: OPDModule, data: pl.LightningDataModule, k: int = 5, shown: int = 4) -> Iterator[Step]:
    """``trainer.fit(module, data)``, paused after every optimizer step. Leaving the loop ends the fit.

    The fit runs in a thread of its own, which stands still while the loop's body runs. `TokenRecords` are off.

    Args:
        trainer: of one device.
        module: what is trained.
        data: its prompts.
        k: likeliest tokens that are kept of both models.
        shown: rollouts that a step shows.

    Raises:
        ValueError: for several devices.
    """
    if trainer.world_size > 1:
        raise ValueError(f"steps work on one device, and this trainer has {trainer.world_size}: set trainer.devices to 1")
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [c for c in callbacks if not isinstance(c, TokenRecords)]  # they watch tokens of their own
    handover, threads = _Handover(k, shown), torch.get_num_threads()
    callbacks.append(handover)

    def fit() -> None:
        torch.set_num_threads(threads)  # counts for each thread by itself
        try:
            trainer.fit(module, datamodule=data)
        except BaseException as error:  # raised again in the loop
            handover.error = error
        finally:
            handover.steps.put(None)

    fitting = threading.Thread(target=fit, name="opd-fit", daemon=True)
    fitting.start()
    try:
        while (step := handover.steps.get()) is not None:
            yield step
            handover.go.release()
        if handover.error is not None:
            raise handover.error
    finally:
        handover.stop = True
        handover.go.release()
        fitting.join()
        callbacks.remove(handover)
