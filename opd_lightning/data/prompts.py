"""Prompt sets: rows from a file, a data set, a generator of puzzles, or a task of the package.

A row is a mapping with ``prompt`` (a text, or chat messages), optionally ``completion`` (a reference text) and any columns
that a grader needs.
"""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning.configurable import Configurable
from opd_lightning.data.tasks import Task
from opd_lightning.metrics.graders import Grader
from opd_lightning.paths import data_file

__all__ = ["DatasetPrompts", "GivenPrompts", "JsonlPrompts", "PromptSet", "ReasoningGymPrompts", "TaskPrompts"]

Row = Mapping[str, Any]
OnBadRow = Literal["stop", "skip"]
SHOWN = 5


class BadRows(ValueError):
    """Rows of a prompt set that cannot be used."""


class PromptSet(Configurable, ABC):
    """Where prompts come from."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """All rows, in a fixed order."""

    def grader(self) -> Grader | None:
        """The grader that belongs to the set, if it has one."""
        return None


def checked(found: Iterable[tuple[str, Any]], columns: Mapping[str, str], on_bad_row: OnBadRow) -> list[Row]:
    """Rows with their columns renamed; bad ones are reported by place.

    Args:
        found: (place, row) pairs; a row that could not be read is an exception.
        columns: name here -> name in the row, for ``prompt`` and ``completion``.
        on_bad_row: ``stop`` raises, ``skip`` warns and goes on.

    Raises:
        BadRows: naming the first places, with what is wrong there.
    """
    good: list[Row] = []
    bad: list[str] = []
    for place, row in found:
        problem = _problem(row, columns["prompt"])
        if problem:
            bad.append(f"{place}: {problem}")
            continue
        renamed = dict(row)
        for name, column in columns.items():
            if column in row:
                renamed[name] = row[column]
        good.append(renamed)
    if bad:
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        report = f"{len(bad)} of {len(bad) + len(good)} rows cannot be used:\n  " + "\n  ".join(bad[:SHOWN]) + more
        if on_bad_row == "stop" or not good:
            raise BadRows(f"{report}\n  Mend them, or set `on_bad_row: skip` to go on without them.")
        rank_zero_warn(report)
    if not good:
        raise BadRows("the prompt set has no rows")
    return good


def _problem(row: Any, prompt_key: str) -> str | None:
    if isinstance(row, Exception):
        return str(row)
    if not isinstance(row, Mapping):
        return f"a JSON object is needed, got {type(row).__name__}"
    if prompt_key not in row:
        return f"no column {prompt_key!r}; columns: {', '.join(map(str, row)) or 'none'}"
    prompt = row[prompt_key]
    if isinstance(prompt, str):
        return None if prompt.strip() else f"{prompt_key!r} is empty"
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt):
        return None
    return f"{prompt_key!r} must be a text or a list of messages with role and content, got {type(prompt).__name__}"


class JsonlPrompts(PromptSet):
    """One JSON object a line.

    Args:
        path: the file; ``package:<module>/<file>`` for one that an installed package carries.
        prompt_key: column with the prompt.
        completion_key: column with the reference completion, where there is one.
        on_bad_row: ``stop`` (with file and line), or ``skip`` them with a warning.
    """

    def __init__(
        self,
        path: str,
        prompt_key: str = "prompt",
        completion_key: str = "completion",
        on_bad_row: OnBadRow = "stop",
    ) -> None:
        self.path, self.on_bad_row = path, on_bad_row
        self.columns = {"prompt": prompt_key, "completion": completion_key}

    def rows(self) -> list[Row]:
        file = data_file(self.path)

        def read() -> Iterable[tuple[str, Any]]:
            for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    yield f"{file}:{number}", json.loads(line.decode())
                except ValueError as error:  # not JSON, or not UTF-8
                    yield f"{file}:{number}", error

        return checked(read(), self.columns, self.on_bad_row)


class DatasetPrompts(PromptSet):
    """A data set of the hub or a local folder, through the ``datasets`` library.

    Args:
        path: hub name, or a local file or folder that ``datasets.load_dataset`` understands.
        split: which part.
        name: configuration of the data set, where it has several.
        prompt_key: column with the prompt.
        completion_key: column with the reference completion, where there is one.
        on_bad_row: ``stop``, or ``skip`` them with a warning.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        prompt_key: str = "prompt",
        completion_key: str = "completion",
        on_bad_row: OnBadRow = "stop",
    ) -> None:
        self.path, self.split, self.name, self.on_bad_row = path, split, name, on_bad_row
        self.columns = {"prompt": prompt_key, "completion": completion_key}

    def rows(self) -> list[Row]:
        if importlib.util.find_spec("datasets") is None:
            raise ModuleNotFoundError("DatasetPrompts needs the datasets library: pip install 'opd_lightning[datasets]'")
        import datasets

        table = datasets.load_dataset(self.path, self.name, split=self.split)
        return checked(((f"{self.path}[{i}]", row) for i, row in enumerate(table)), self.columns, self.on_bad_row)


class _GymGrader(Grader):
    """reasoning-gym's own verdict on a completion."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, row: Row, completion: str) -> float:
        import reasoning_gym

        score = reasoning_gym.get_score_answer_fn(self.task)
        return float(score(answer=completion.strip(), entry={k: row[k] for k in ("question", "answer", "metadata")}))


class ReasoningGymPrompts(PromptSet):
    """Procedurally generated, verifiable puzzles of reasoning-gym, graded by their own rules.

    Args:
        task: name of the puzzle, e.g. ``chain_sum`` or ``gsm_symbolic``.
        size: number of rows.
        seed: of the generator.
        options: further settings of the puzzle.

    Raises:
        ValueError: in `rows`, for an unknown puzzle, naming near ones.
    """

    def __init__(self, task: str, size: int = 1000, seed: int = 0, options: dict[str, Any] | None = None) -> None:
        self.task, self.size, self.seed, self.options = task, size, seed, options or {}

    def rows(self) -> list[Row]:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ModuleNotFoundError("ReasoningGymPrompts needs reasoning-gym: pip install 'opd_lightning[tasks]'")
        import difflib

        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self.task not in DATASETS:
            near = difflib.get_close_matches(self.task, DATASETS, 3)
            raise ValueError(f"reasoning-gym has no task {self.task!r}; near: {', '.join(near) or ', '.join(sorted(DATASETS))}")
        puzzles = reasoning_gym.create_dataset(self.task, size=self.size, seed=self.seed, **self.options)
        return [{"prompt": p["question"], **p} for p in puzzles]

    def grader(self) -> Grader:
        return _GymGrader(self.task)


class GivenPrompts(PromptSet):
    """Prompts written down in the configuration or on the command line.

    Args:
        prompts: the texts.
    """

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def rows(self) -> list[Row]:
        return checked(
            ((f"prompt {i}", {"prompt": p}) for i, p in enumerate(self.prompts)), {"prompt": "prompt"}, on_bad_row="stop"
        )


class TaskPrompts(PromptSet):
    """Rows of a synthetic task of the package, each with a correct written solution.

    Args:
        task: the task.
        size: number of rows, all different.
        seed: of the generator.
        split: ``train`` and ``held_out`` never share a prompt, whatever their seeds; ``all`` draws from both.
    """

    def __init__(self, task: Task, size: int = 1000, seed: int = 0, split: Literal["all", "train", "held_out"] = "all") -> None:
        self.task, self.size, self.seed, self.split = task, size, seed, split

    def rows(self) -> list[Row]:
        return self.task.rows(self.size, self.seed, self.split)

    def grader(self) -> Grader:
        return self.task
