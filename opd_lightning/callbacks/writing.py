"""How callbacks have text written: both models behind a sampler, seeded by row, with progress shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from opd_lightning.configurable import to_plain
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt


class RunWriters:
    """Both models behind the run's sampler, with progress shown in the bar (see `opd_lightning.sources.Writers`)."""

    def __init__(self, trainer: pl.Trainer, pl_module: Any, sampler: NativeSampler, seed: int, purpose: str) -> None:
        self.trainer, self.pl_module, self.sampler = trainer, pl_module, sampler
        self.seed, self.purpose = seed, purpose

    def student(self, prompts: Sequence[Prompt]) -> list[Completion]:
        return self._write(prompts, "student")

    def teacher(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[Completion]:
        return self._write(prompts, "teacher", attempt)

    def grade(self, prompts: Sequence[Prompt], written: Sequence[Completion]) -> list[float] | None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        grader = data.prompt_set.grader()
        return None if grader is None else data.grades(prompts, written, grader)

    def archive(self) -> tuple[Path, dict[str, Any]] | None:
        teacher = self.pl_module.teacher
        if teacher.moving:
            return None
        decides = {"teacher": to_plain(teacher), "sampler": to_plain(self.sampler), "seed": self.seed, "purpose": self.purpose}
        if teacher.starts_as_student:
            decides["student"] = to_plain(self.pl_module.recipe)
        return Path(self.trainer.default_root_dir) / "teacher_text", decides

    def _write(self, prompts: Sequence[Prompt], who: str, attempt: int = 0) -> list[Completion]:
        again = (attempt,) if attempt else ()
        seeds = [fold(self.seed, self.purpose, p.row, *again) for p in prompts]
        with self.trainer.precision_plugin.forward_context():
            return self.pl_module.write(prompts, who, self.sampler, seeds, self._progress(len(prompts), who))  # type: ignore[no-any-return]

    def _progress(self, total: int, who: str) -> Callable[[int], None] | None:
        show = getattr(self.trainer.progress_bar_callback, "show_writing", None)
        return None if show is None else lambda done: show(f"{self.purpose} ({who})", done, total)
