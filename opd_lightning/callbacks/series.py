"""Series: a file of the run that grows by a few lines at some steps, whole again after every interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class Series:
    """JSON lines below the run's folder, each with its ``step``; written by rank zero alone.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, trainer: pl.Trainer) -> None:
        """Drop what the coming steps will write again: lines of later steps, and one that a crash has cut."""
        file = self._file(trainer)
        if not self._writes(trainer) or not file.is_file():
            return
        kept = [line for line in read(file) if line["step"] <= trainer.global_step]
        self._put(file, kept, "w")

    def add(self, trainer: pl.Trainer, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines."""
        if lines and self._writes(trainer):
            self._put(self._file(trainer), lines, "a")

    def _file(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.name

    def _writes(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _put(self, file: Path, lines: Sequence[dict[str, Any]], mode: str) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open(mode, encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        except OSError as error:
            rank_zero_warn(f"{file} was not written: {error}")


def read(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none where there is no file."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # cut by a crash
            break
    return found
