"""Synthetic tasks that can be verified: prompts, a written solution for each, and the grader."""

from __future__ import annotations

import random
import zlib
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

    def rows(self, size: int, seed: int, split: str = "all") -> list[Mapping[str, Any]]:
        """``size`` rows with different prompts, a function of the seed.

        Args:
            size: number of rows.
            seed: of the generator.
            split: ``train`` and ``held_out`` never share a prompt, whatever their seeds: a hash of the prompt decides, one
                prompt in ten is held out. ``all`` draws from both.

        Raises:
            ValueError: if the task does not have that many prompts.
        """
        numbers = random.Random(seed)
        found: dict[str, Mapping[str, Any]] = {}
        for _ in range(200 * size):
            row = self.row(numbers)
            if split != "all" and (zlib.crc32(row["prompt"].encode()) % 10 == 0) != (split == "held_out"):
                continue
            found.setdefault(row["prompt"], row)
            if len(found) == size:
                return list(found.values())
        raise ValueError(f"{self!r} has fewer than {size} different prompts; ask for at most {len(found)}")


class Addition(Task):
    """Adding two numbers with the work written out, the least significant digits first, then ``#`` and the sum.

    Solutions come in two styles, so that a model of them is a distribution and not one text per prompt. For 57 + 85::

        spoken     7+5+0=12,5+8+1=14,#142     digit + digit + carry = column sum
        terse      7&5=2c1;5&8=4c1;#142       digit & digit = last digit, c carry

    and either digit of a column may stand first.

    Args:
        digits: digits of both numbers, written with leading zeros; the sum has one more.
        terse: share of solutions in the terse style.
        swap: chance that the digits of a column are written in the other order.

    Raises:
        ValueError: for a number of digits below 1, or a share outside [0, 1].

    >>> Addition(digits=2).row(random.Random(3))["prompt"]
    '30+75='
    """

    CHARACTERS = "0123456789+=,;&c#"

    def __init__(self, digits: int = 4, terse: float = 0.4, swap: float = 0.3) -> None:
        if digits < 1 or not 0.0 <= terse <= 1.0 or not 0.0 <= swap <= 1.0:
            raise ValueError(f"Addition(digits={digits}, terse={terse}, swap={swap}): at least 1 digit, shares in [0, 1]")
        self.digits, self.terse, self.swap = digits, terse, swap

    def row(self, random_numbers: random.Random) -> dict[str, Any]:
        a, b = (random_numbers.randrange(10**self.digits) for _ in range(2))
        solution = self._solution(a, b, random_numbers)
        return {"prompt": f"{a:0{self.digits}d}+{b:0{self.digits}d}=", "completion": solution, "answer": a + b}

    def _solution(self, a: int, b: int, random_numbers: random.Random) -> str:
        terse = random_numbers.random() < self.terse
        columns, carry = [], 0
        for place in range(self.digits):
            pair = [n // 10**place % 10 for n in (a, b)]
            if random_numbers.random() < self.swap:
                pair.reverse()
            total = sum(pair) + carry
            if terse:
                columns.append(f"{pair[0]}&{pair[1]}={total % 10}c{total // 10};")
            else:
                columns.append(f"{pair[0]}+{pair[1]}+{carry}={total:02d},")
            carry = total // 10
        return f"{''.join(columns)}#{a + b:0{self.digits + 1}d}"

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        answer = completion.rpartition("#")[2]
        return float(answer.isdigit() and int(answer) == int(row["answer"]))
