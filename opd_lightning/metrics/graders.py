"""Graders: from a completion to a score in [0, 1]."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from opd_lightning.configurable import Configurable

__all__ = ["Contains", "ExactMatch", "Grader", "NumberMatch", "RegexMatch"]


class Grader(Configurable, ABC):
    """Judges a completion against the row of its prompt."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        """1.0 for right, 0.0 for wrong, or something between.

        Args:
            row: the prompt's columns, and ``ended``: whether the completion closed with an end-of-sequence token.
            completion: the text, without special tokens.
        """


def _expected(row: Mapping[str, Any], key: str, grader: str) -> Any:
    if key not in row:
        raise KeyError(f"{grader} compares with column {key!r}, but the rows have {', '.join(row) or 'no columns'}")
    return row[key]


class ExactMatch(Grader):
    """The completion, stripped of blanks at both ends, is the answer.

    Args:
        answer_key: column with the answer.
    """

    def __init__(self, answer_key: str = "answer") -> None:
        self.answer_key = answer_key

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        return float(completion.strip() == str(_expected(row, self.answer_key, "ExactMatch")).strip())


class Contains(Grader):
    """The answer stands somewhere in the completion.

    Args:
        answer_key: column with the answer.
    """

    def __init__(self, answer_key: str = "answer") -> None:
        self.answer_key = answer_key

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        return float(str(_expected(row, self.answer_key, "Contains")).strip() in completion)


class NumberMatch(Grader):
    """The last number in the completion equals the answer.

    Args:
        answer_key: column with the answer.
        tolerance: largest allowed difference.

    >>> NumberMatch()({"answer": 1234}, "so the total is 1,234.")
    1.0
    """

    NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

    def __init__(self, answer_key: str = "answer", tolerance: float = 1e-6) -> None:
        self.answer_key, self.tolerance = answer_key, tolerance

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        expected = self.NUMBER.findall(str(_expected(row, self.answer_key, "NumberMatch")))
        found = self.NUMBER.findall(completion)
        if not expected or not found:
            return 0.0
        answer, last = (float(n[-1].replace(",", "")) for n in (expected, found))
        return float(abs(answer - last) <= self.tolerance)


class RegexMatch(Grader):
    r"""The completion matches a regular expression: for rules of style and format.

    Args:
        pattern: searched with ``re.search``; begin it with ``^`` or ``\\A`` to anchor it.
        must_end: a completion that ran into the length limit is wrong, whatever it says.

    Raises:
        ValueError: if the pattern is not a regular expression.
    """

    def __init__(self, pattern: str, must_end: bool = False) -> None:
        self.must_end = must_end
        try:
            self.compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"RegexMatch(pattern={pattern!r}): {error}") from error

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        if self.must_end and not row["ended"]:
            return 0.0
        return float(self.compiled.search(completion) is not None)
