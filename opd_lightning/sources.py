"""Where completions come from. Training sees rows of one buffer, whoever wrote them.

Cold start, sequence-level distillation and GKD's mixture are other sources on the same path, never branches in the training
step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from opd_lightning.configurable import Configurable
from opd_lightning.types import NOT_A_STUDENT, Completion, Prompt

__all__ = ["DatasetSource", "MixtureSource", "Source", "StudentSource", "TeacherSource"]


class Writers(Protocol):
    """What a source may ask for text: both models behind the run's sampler. One completion a prompt, in order."""

    def student(self, prompts: Sequence[Prompt]) -> list[Completion]: ...

    def teacher(self, prompts: Sequence[Prompt]) -> list[Completion]: ...


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
