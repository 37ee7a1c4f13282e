"""``opd pick-teacher``: which of several teachers one student learns most from, by the doctor's figures on its own text.

The best score is no guide: a stronger teacher of the student's own recipe taught it nothing, and one that writes in another
pattern was not followed ("Rethinking On-Policy Distillation", arXiv 2604.13016, sections 3.1 and 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lightning.inspect.doctor import Diagnosis, diagnose
from opd_lightning.inspect.examination import Examination
from opd_lightning.inspect.setups import Setup
from opd_lightning.inspect.verdict import ORDER, REFUSE, Thresholds, Verdict
from opd_lightning.models import CheckpointTeacher
from opd_lightning.models.loading import resolve
from opd_lightning.models.vocabulary import VocabularyMismatch


@dataclass(frozen=True)
class Candidate:
    """A teacher with what the examination found."""

    name: str
    diagnosis: Diagnosis

    @property
    def rank(self) -> tuple[Any, ...]:
        """Smaller is better: the verdict; then, of graded pairs, how much the student's own text gains when the teacher goes on
        (mean over the cuts); then the probability on shared tokens.
        """
        figures, word = self.diagnosis.figures, ORDER.index(self.diagnosis.verdict.word)
        if figures is None:
            return (word, 0.0, 0.0)
        gains = list(figures.gain.values()) if figures.graded else []
        return (word, -sum(gains) / max(len(gains), 1), -figures.mass[0])


def pick(setup: Setup, names: Sequence[str], prompts: int, samples: int, k: int, at: Thresholds) -> list[Candidate]:
    """Examine every teacher with the same student and the same texts of it; best first.

    Args:
        setup: student and prompts; its own teacher is not loaded.
        names: paths as `CheckpointTeacher` takes them: models, adapters, checkpoints of earlier runs.
        prompts, samples, k: see `Examination`.
        at: thresholds.

    Raises:
        ValueError: for no name, or one given twice.
        FileNotFoundError: for a name that stands for nothing; nothing has been loaded then.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--teachers {' '.join(names)}: give at least one teacher, and each once")
    teachers = {name: CheckpointTeacher(name) for name in names}
    for name, teacher in teachers.items():
        if not teacher.is_run and not Path(name).is_dir():
            resolve(name)
    examination: Examination | None = None
    out = []
    for name, teacher in teachers.items():
        setup.module.teacher = teacher
        try:
            setup.module.prove_vocabularies()
        except VocabularyMismatch as error:
            out.append(Candidate(name, Diagnosis(Verdict(REFUSE, (str(error).partition("\n")[0],)), {}, ())))
            continue
        if examination is None:
            examination = Examination(setup, prompts, samples, k)
        else:
            examination.ask(teacher)
        out.append(Candidate(name, diagnose(examination, setup, at, forecasting=False)))
    return sorted(out, key=lambda candidate: candidate.rank)


def table(found: Sequence[Candidate]) -> str:
    """Best first, a line each, and below it why."""
    width = max([len(c.name) for c in found] + [7]) + 2
    verdicts = max(len(str(c.diagnosis.verdict)) for c in found) + 2
    columns = f"{'accuracy':>9}{'gain':>8}{'mass':>7}{'rev. KL':>9}{'headroom':>10}{'size':>8}"
    lines = [f"{'teacher':<{width}}{'verdict':<{verdicts}}{columns}"]
    for c in found:
        f, start = c.diagnosis.figures, f"{c.name:<{width}}{c.diagnosis.verdict!s:<{verdicts}}"
        if f is None:
            lines.append(start.rstrip())
            continue
        accuracy = f"{f.teacher.accuracy:.0%}" if f.teacher and f.teacher.accuracy is not None else "-"
        gain = f"{-c.rank[1]:+.0%}" if f.graded and f.gain else "-"
        lines.append(
            f"{start}{accuracy:>9}{gain:>8}{f.mass[0]:>7.2f}{f.reverse_kl:>9.3f}{f.headroom:>10.0%}{_size(f.parameters[1]):>8}"
        )
    student = next((c.diagnosis.figures for c in found if c.diagnosis.figures is not None), None)
    if student is not None:
        own = f", accuracy {student.student.accuracy:.0%}" if student.student.accuracy is not None else ""
        lines += ["", f"the student: {_size(student.parameters[0])} parameters{own}"]
    lines.append("gain: accuracy that the student's own text gains when the teacher goes on from 25, 50, 75 % of it")
    for c in found:
        lines += ["", f"{c.name}: {c.diagnosis.verdict}", *(f"  - {reason}" for reason in c.diagnosis.verdict.reasons)]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2g} M" if count >= 1e5 else f"{count / 1e3:.0f} k"
