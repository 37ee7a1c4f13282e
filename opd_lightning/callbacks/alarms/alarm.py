"""What an alarm is: it reads what was logged at the end of an optimizer step and never runs a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from opd_lightning.configurable import Configurable

SETTLE = 3
"""Measurements whose mean is "the start" that later ones are compared with."""


@dataclass(frozen=True)
class Facts:
    """What an alarm may ask about the run beside its numbers."""

    exact: bool
    """The loss is a sum of divergences, without a signal of drawn tokens, so that it cannot be negative."""
    teacher_moves: bool
    """The teacher follows the student."""


class Alarm(Configurable, ABC):
    """Something that can go wrong; ``advice`` says what to do next.

    Args:
        patience: measurements in a row with the symptom before it rings; then it is silent until the symptom was gone.

    Raises:
        ValueError: for a patience below 1.
    """

    advice: ClassVar[str]

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"{type(self).__name__}(patience={patience}): must be at least 1")
        self.patience = patience
        self.reset()

    @property
    def name(self) -> str:
        """As in the key ``alarm/name``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def reset(self) -> None:
        """Forget what was seen: another phase begins."""
        self.count = 0
        self.memory: dict[str, list[float]] = {}

    @abstractmethod
    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        """What is wrong at this optimizer step; empty for nothing, None if nothing was measured.

        Args:
            now: what this step has logged, all ranks together.
            facts: of the run.
        """

    def watch(self, now: Mapping[str, float], facts: Facts) -> str:
        """What is wrong, at the step where it rings; else empty."""
        found = self.symptom(now, facts)
        if found is None:
            return ""
        self.count = self.count + 1 if found else 0
        return found if self.count == self.patience else ""

    def start(self, key: str, value: float) -> float | None:
        """Mean of the first `SETTLE` values under this key; None while they are collected."""
        first = self.memory.setdefault(key, [])
        if len(first) < SETTLE:
            first.append(value)
            return None
        return fmean(first)

    def best(self, key: str, value: float) -> float:
        """The highest value so far, this one included."""
        self.memory[key] = [max([value, *self.memory.get(key, [])])]
        return self.memory[key][0]

    def last(self, key: str, value: float, number: int) -> list[float]:
        """The values before this one, at most ``number``, oldest first."""
        before = self.memory.get(key, [])
        self.memory[key] = [*before, value][-number:]
        return before
