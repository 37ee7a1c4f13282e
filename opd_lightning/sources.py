"""Where completions come from. Training sees rows of one buffer, whoever wrote them.

Cold start, sequence-level distillation and GKD's mixture are other sources on the same path, never branches in the training
step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning import parallel
from opd_lightning.configurable import Configurable
from opd_lightning.media import digests
from opd_lightning.metrics.text import repeated
from opd_lightning.objectives import Objective
from opd_lightning.types import NOT_A_STUDENT, Completion, Prompt

__all__ = ["DatasetSource", "GradedTeacher", "MixtureSource", "Source", "StudentSource", "TeacherSource"]


class Writers(Protocol):
    """What a source may ask for text: both models behind the run's sampler. One completion a prompt, in order."""

    def student(self, prompts: Sequence[Prompt]) -> list[Completion]: ...

    def teacher(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[Completion]:
        """Other attempts draw other random numbers."""

    def grade(self, prompts: Sequence[Prompt], written: Sequence[Completion]) -> list[float] | None:
        """Scores under the grader of the prompt set; None without one."""

    def archive(self) -> tuple[Path, dict[str, Any]] | None:
        """Where the teacher's text may be kept, and everything but the prompts that decides it, as plain data; None if that
        changes in the run.
        """


class Source(Configurable, ABC):
    """Writes one completion behind every prompt.

    Attributes:
        student_writes: some completions may be the student's own.
        others_write: some completions may be somebody else's.
        teacher_writes: some of those may be the teacher's.
    """

    student_writes: bool = False
    others_write: bool = False
    teacher_writes: bool = False

    @abstractmethod
    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        """One completion a prompt, in order. Every rank calls it equally often."""


class StudentSource(Source):
    """The student writes: on-policy."""

    student_writes = True

    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        return writers.student(prompts)


class TeacherSource(Source):
    """The teacher writes, behind its own prompt where it has one: sequence-level distillation, cold start."""

    others_write = True
    teacher_writes = True

    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        return writers.teacher(prompts)


class GradedTeacher(TeacherSource):
    """The teacher writes, and only what is good is trained on; the text is kept on disk, and read instead of written again.

    A completion is left out if it was cut by the length limit, repeats itself, or fails the grader of the prompt set (where
    there is one). The teacher then tries again; a row that stays bad becomes empty and counts for nothing. After the rejection
    rules of "Rethinking On-Policy Distillation" (arXiv 2604.13016, section 5.1; three attempts as in its code).

    A file holds what one process asked for at once, and is named by everything that decides the text: teacher, sampler, seeds,
    prompts. So a resumed run, and a control with the same seed beside it, find it again.

    Args:
        attempts: how often the teacher may try a prompt.
        min_score: lowest grade that is kept.
        max_repetition: largest share of 3-grams that stood in the text before.
        folder: where the text is kept; null is ``<run>/teacher_text``. A shared one serves several runs.

    Raises:
        ValueError: for attempts below 1.
    """

    def __init__(
        self, attempts: int = 3, min_score: float = 1.0, max_repetition: float = 0.5, folder: str | None = None
    ) -> None:
        if attempts < 1:
            raise ValueError(f"GradedTeacher(attempts={attempts}): must be at least 1")
        self.attempts, self.min_score, self.max_repetition, self.folder = attempts, min_score, max_repetition, folder

    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        file = self._file(prompts, writers)
        found = _read(file) if file is not None else None
        if all(parallel.gather_objects(found is not None)):  # ranks write together, or not at all
            assert found is not None
            return found
        out = list(writers.teacher(prompts))
        bad = self._bad(prompts, out, writers)
        for attempt in range(1, self.attempts):
            some = [prompts[i] for i in bad]
            for i, again in zip(bad, writers.teacher(some, attempt), strict=True):
                out[i] = again
            bad = [bad[j] for j in self._bad(some, [out[i] for i in bad], writers)]
        if 2 * len(bad) > len(prompts):
            rank_zero_warn(
                f"{len(bad)} of {len(prompts)} completions of the teacher were not good enough after {self.attempts} attempts "
                "and are left out: raise rollout.sampler.max_new_tokens, lower min_score, or look at the teacher (opd doctor)"
            )
        for i in bad:
            out[i] = Completion((), (), ended=True, policy_step=NOT_A_STUDENT)
        if file is not None:
            _keep(file, prompts, out)
        return out

    def _bad(self, prompts: Sequence[Prompt], written: Sequence[Completion], writers: Writers) -> list[int]:
        scores = writers.grade(prompts, written) or [self.min_score] * len(prompts)
        return [
            i
            for i, (c, score) in enumerate(zip(written, scores, strict=True))
            if not c.ended or score < self.min_score or float(repeated([torch.tensor(c.ids)])) > self.max_repetition
        ]

    def _file(self, prompts: Sequence[Prompt], writers: Writers) -> Path | None:
        if (archive := writers.archive()) is None:
            return None
        folder, origin = archive
        asked = [(p.row, ids, *digests(media)) for p in prompts for ids, media in (p.for_teacher,)]
        rules = (self.attempts, self.min_score, self.max_repetition)
        name = hashlib.sha256(json.dumps([origin, rules, asked]).encode()).hexdigest()[:24]
        return (Path(self.folder) if self.folder else folder) / f"{name}.jsonl"


def _read(file: Path) -> list[Completion] | None:
    """Completions that were kept; None if there are none."""
    if not file.is_file():
        return None
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Completion(tuple(r["ids"]), tuple(r["logprobs"]), r["ended"], NOT_A_STUDENT) for r in rows]


def _keep(file: Path, prompts: Sequence[Prompt], written: Sequence[Completion]) -> None:
    """Write completions whole or not at all: another process may read, and a run may be killed."""
    rows = [
        {"prompt": p.text, "row": p.row, "ids": c.ids, "logprobs": c.logprobs, "ended": c.ended}
        for p, c in zip(prompts, written, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f"{file.name}.{os.getpid()}")
    half.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    half.replace(file)


class DatasetSource(Source):
    """The data set's own completions. Their sampler is unknown, so they fit exact supports and the written token.

    Raises:
        ValueError: in `produce`, for a prompt without a completion.
    """

    others_write = True

    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        out = []
        for prompt in prompts:
            if prompt.reference is None:
                raise ValueError(
                    f"rollout.source is DatasetSource, but prompt {prompt.index} ({prompt.text[:60]!r}) has no completion: "
                    "give the rows a `completion` column (data.prompts), or use TeacherSource"
                )
            unknown = (math.nan,) * len(prompt.reference)
            out.append(Completion(prompt.reference, unknown, ended=True, policy_step=NOT_A_STUDENT))
        return out


class MixtureSource(Source):
    """A fixed share of the rows from one source, the rest from another.

    The pattern is a function of the row number, the same on every rank (GKD draws a coin a batch; the share is the same).

    Args:
        first: writes ``fraction`` of the rows.
        second: writes the others.
        fraction: in [0, 1].

    Raises:
        ValueError: if fraction is outside [0, 1].
    """

    def __init__(self, first: Source, second: Source, fraction: float = 0.5) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"MixtureSource(fraction={fraction}): must lie in [0, 1]")
        self.first, self.second, self.fraction = first, second, fraction
        used = [s for s, share in ((first, fraction), (second, 1.0 - fraction)) if share > 0.0]
        self.student_writes = any(s.student_writes for s in used)
        self.others_write = any(s.others_write for s in used)
        self.teacher_writes = any(s.teacher_writes for s in used)

    def produce(self, prompts: Sequence[Prompt], writers: Writers) -> list[Completion]:
        chosen = [int((p.row + 1) * self.fraction) > int(p.row * self.fraction) for p in prompts]
        parts = {
            flag: iter(source.produce([p for p, c in zip(prompts, chosen, strict=True) if c is flag], writers))
            for flag, source in ((True, self.first), (False, self.second))
        }
        return [next(parts[flag]) for flag in chosen]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a source and an objective of its own.

    Attributes:
        name: shown in messages.
        end: first optimizer step after it.
        source: who writes the completions.
        objective: what is descended.
    """

    name: str
    end: int
    source: Source
    objective: Objective
