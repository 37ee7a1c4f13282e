"""Synthetic tasks that can be verified: prompts, a written solution for each, and the grader."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from opd_lightning.metrics.graders import Grader

__all__ = ["Addition", "Task"]


class Task(Grader):
    """A generator of rows with a grader. A row has ``prompt``, ``completion`` (a correct solution) and ``answer``."""

    @abstractmethod
    def row(self, random_numbers: random.Random) -> dict[str, Any]:
        """One row."""

    def rows(self, size: int, seed: int) -> list[Mapping[str, Any]]:
        """``size`` rows with different prompts, a function of the seed.

        Raises:
            ValueError: if the task does not have that many prompts.
        """
        numbers = random.Random(seed)
        found: dict[str, Mapping[str, Any]] = {}
        for _ in range(20 * size):
            row = self.row(numbers)
            found.setdefault(row["prompt"], row)
            if len(found) == size:
                return list(found.values())
        raise ValueError(f"{self!r} has fewer than {size} different prompts; ask for at most {len(found)}")


class Addition(Task):
    """Adding two numbers with the work written out, least significant digit first.

    Args:
        digits: digits of both numbers, with leading zeros.

    >>> Addition(digits=2).row(random.Random(0))["prompt"]
    '49+97='
    """

    def __init__(self, digits: int = 3) -> None:
        if digits < 1:
            raise ValueError(f"Addition(digits={digits}): at least 1")
        self.digits = digits

    def row(self, random_numbers: random.Random) -> dict[str, Any]:
        a, b = (random_numbers.randrange(10**self.digits) for _ in range(2))
        x, y = (f"{n:0{self.digits}d}" for n in (a, b))
        return {"prompt": f"{x}+{y}=", "completion": str(a + b), "answer": a + b}

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        return float(completion.rsplit("#", 1)[-1].strip() == str(row["answer"]))
