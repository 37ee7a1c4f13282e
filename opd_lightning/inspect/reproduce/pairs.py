"""Pairs that `opd doctor` judges and that are then trained: does the verdict agree with the outcome?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_lightning.data import PromptDataModule
from opd_lightning.data.templates import Template
from opd_lightning.inspect.doctor import diagnose
from opd_lightning.inspect.examination import Examination
from opd_lightning.inspect.reproduce.arms import Networks, Record, Tick
from opd_lightning.inspect.reproduce.digits import DigitSum
from opd_lightning.inspect.reproduce.training import Training, quiet
from opd_lightning.inspect.setups import Setup
from opd_lightning.inspect.verdict import GO, Thresholds
from opd_lightning.models import Student

CLOSED, LEAST_GAP = 0.5, 0.05
"""A run has succeeded if it closed this share of the gap in held-out accuracy, and there was a gap."""
PROMPTS, SAMPLES = 16, 4
"""What the doctor takes by itself."""


class Framed(DigitSum):
    """`DigitSum` with something behind its prompts, and something before and behind its completions.

    Args:
        asked: behind a prompt.
        opening: before a completion.
        closing: behind a completion.
        task: arguments of `DigitSum`.
    """

    def __init__(self, asked: str = "", opening: str = "", closing: str = "", **task: Any) -> None:
        super().__init__(**task)
        self.asked, self.opening, self.closing = asked, opening, closing

    def row(self, random_numbers: random.Random) -> dict[str, Any]:
        row = super().row(random_numbers)
        return {
            **row,
            "prompt": row["prompt"] + self.asked,
            "completion": f"{self.opening}{row['completion']}{self.closing}",
        }


class Ended(Training):
    """A fit of a network whose tokenizer says that another token ends a text.

    Args:
        end: the character.
        training: arguments of `Training`.
    """

    def __init__(self, end: str, **training: Any) -> None:
        super().__init__(**training)
        self.end = end

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        record = super().run(seed, networks, tick, keep)
        if keep is not None:
            tokenizer = Student(str(keep)).tokenizer()
            tokenizer.eos_token = self.end
            tokenizer.save_pretrained(keep)
        return record


class Pair(Training):
    """A student and a teacher, judged by `opd doctor` and then trained.

    The doctor has foreseen success where it says ``go``; a run has succeeded if it closed at least half of the gap in held-out
    accuracy, and there was one (5 points).

    Args:
        about: the pair in words.
        flaw: why it should fail; empty for one that should succeed.
        teacher_template: what the teacher reads; null shows it what the student reads.
        training: arguments of `Training`.
    """

    def __init__(self, about: str, flaw: str = "", teacher_template: Template | None = None, **training: Any) -> None:
        super().__init__(**training)
        self.about, self.flaw, self.teacher_template = about, flaw, teacher_template

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        with quiet():
            setup = Setup({}, self._module(seed, networks), self._refresh(seed), self._cold_start(), self._data(seed))
            found = diagnose(Examination(setup, PROMPTS, SAMPLES), setup, Thresholds(), forecasting=False)
        record = super().run(seed, networks, tick, keep)
        gap = record.figures["teacher_accuracy"] - record.figures["accuracy_start"]
        foreseen = found.verdict.word == GO
        succeeded = gap >= LEAST_GAP and record.figures["recovery"] >= CLOSED
        assert found.figures is not None
        figures = {"foreseen": float(foreseen), "succeeded": float(succeeded), "agrees": float(foreseen is succeeded)}
        figures |= {"doctor_mass": found.figures.mass[0], "doctor_reverse_kl": found.figures.reverse_kl}
        words = {"verdict": found.verdict.word, "reason": found.verdict.reasons[0]}
        return replace(record, figures=record.figures | figures, words=words)

    def _data(self, seed: int) -> PromptDataModule:
        data = super()._data(seed)
        if self.teacher_template is not None:
            data.teacher_template = self.teacher_template.within(data.template)
        return data

    @classmethod
    def table(cls, found: Sequence[tuple[Any, Sequence[Record]]]) -> list[str]:
        """The confusion of verdicts and outcomes over all pairs and seeds, and a row a pair."""
        every = [record.figures for _, records in found for record in records]
        lines = ["| | trained: succeeded | trained: failed |", "|---|---|---|"]
        for title, said in (("the doctor says `go`", 1.0), ("it says anything else", 0.0)):
            cells = [sum(f["foreseen"] == said and f["succeeded"] == came for f in every) for came in (1.0, 0.0)]
            lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
        right = sum(int(f["agrees"]) for f in every)
        lines += ["", f"{right} of {len(every)} verdicts agree with what training came to.", ""]
        lines += ["| pair | built to | verdict | accuracy (teacher) | agree |", "|---|---|---|---|---|"]
        for pair, records in found:
            built = f"fail: {pair.flaw}" if pair.flaw else "succeed"
            words = [r.words["verdict"] for r in records]
            told = ", ".join(f"{w} ({words.count(w)})" if len(set(words)) > 1 else w for w in dict.fromkeys(words))
            start, end, theirs = (
                sum(r.figures[n] for r in records) / len(records) for n in ("accuracy_start", "accuracy", "teacher_accuracy")
            )
            agree = sum(int(r.figures["agrees"]) for r in records)
            lines.append(
                f"| {pair.about} | {built} | {told} | {start:.0%} → {end:.0%} ({theirs:.0%}) | {agree} of {len(records)} |"
            )
        return lines
