"""Rollouts that are written one refresh ahead, while the student trains on the ones before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from opd_lightning import parallel
from opd_lightning.media import beside
from opd_lightning.models.teachers.base import copy_of
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt


class Ahead:
    """Writes the next refresh in a thread, with a copy of the student as it is when it begins.

    What is written is a function of that copy and the seeds, so it does not matter how long the thread takes; a checkpoint
    waits for it and holds its completions.

    Args:
        device: of the copy; None is the student's. Frozen weights on the same device are shared with the student.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.refresh = -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="opd ahead")
        self._writing: Future[list[Completion]] | None = None
        self._rows: list[int] = []
        self._copy: nn.Module | None = None

    @classmethod
    def of(cls, where: str | None, trainer: pl.Trainer, sampler: NativeSampler) -> Ahead | None:
        """What ``rollout.ahead`` asks for.

        Raises:
            ValueError: for a strategy under which no rank holds a whole student, or an engine that holds one itself.
        """
        if where is None:
            return None
        if sampler.foreign:
            raise ValueError(
                f"rollout.ahead writes with a copy of the student, and {type(sampler).__name__} has its own: leave it out"
            )
        if parallel.is_sharded(trainer.strategy):
            raise ValueError("rollout.ahead keeps a whole copy of the student: take strategy ddp, or leave it out (null)")
        return cls(None if where == "same" else torch.device(where))

    def start(
        self, refresh: int, prompts: Sequence[Prompt], seed: int, sampler: NativeSampler, trainer: pl.Trainer, pl_module: Any
    ) -> None:
        """Begin to write a refresh behind the student of this moment, which is copied before this returns.

        Args:
            refresh: its number.
            prompts: of this rank.
            seed: of the run's rollouts.
            sampler: how completions are drawn.
            trainer, pl_module: of the run.
        """
        student = pl_module.student
        if self._copy is None:
            self._copy = copy_of(student, share=self.device is None)
            if self.device is not None:
                self._copy.to(self.device)
        with torch.no_grad():
            for mine, theirs in zip(self._copy.parameters(), student.parameters(), strict=True):
                if mine is not theirs:
                    mine.copy_(theirs)
        texts, seeds = [p.ids for p in prompts], [fold(seed, "rollout", p.row) for p in prompts]
        shown = [p.media for p in prompts]
        copied, vocabulary, step = self._copy, pl_module.vocabulary, pl_module.global_step
        context = trainer.precision_plugin.forward_context()

        def write() -> list[Completion]:
            with context:
                return sampler.write(copied, texts, seeds, vocabulary, step, **beside(shown))

        self.refresh, self._rows = refresh, [p.row for p in prompts]
        self._writing = self._thread.submit(write)

    def take(self, refresh: int) -> list[Completion] | None:
        """The completions of a refresh, waited for; None if they were not written ahead."""
        if self._writing is None or self.refresh != refresh:
            return None
        written, self._writing = self._writing.result(), None
        return written

    def state(self, alone: bool) -> list[list[Any]]:
        """Row number and completion of everything that is written and not yet taken, of all ranks or, alone, of this one; plain
        data. All ranks must call it.
        """
        written = zip(self._rows, self._writing.result(), strict=True) if self._writing is not None else ()
        mine = [[row, list(c.ids), list(c.logprobs), c.ended, c.policy_step] for row, c in written]
        return mine if alone else [row for rows in parallel.gather_objects(mine) for row in rows]

    def restore(self, refresh: int, rows: Sequence[int], state: Sequence[Sequence[Any]]) -> None:
        """Put back what `state` returned; this rank takes its own rows of a refresh."""
        kept = {row: Completion(tuple(ids), tuple(logprobs), ended, step) for row, ids, logprobs, ended, step in state}
        if kept:
            self.refresh, self._rows = refresh, list(rows)
            self._writing = Future()
            self._writing.set_result([kept[row] for row in rows])
