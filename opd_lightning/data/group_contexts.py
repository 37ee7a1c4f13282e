"""Contexts made from what the group has written: a sibling's success, feedback on the own attempt."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.configurable import Configurable
from opd_lightning.data.contexts import Context
from opd_lightning.data.templates import Template
from opd_lightning.metrics.graders import Grader

__all__ = ["Feedback", "FirstOf", "Judge", "SiblingSuccess", "Verdict"]

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Attempt:
    """A graded completion.

    Attributes:
        row: number of the rollout.
        text: without special tokens.
        score: of the grader, in [0, 1].
    """

    row: int
    text: str
    score: float


class SiblingSuccess(Context):
    """A successful completion of the same prompt by the student itself (SDPO, arXiv 2601.20802): the first of the group that
    is not the row's own. Rows without one are not trained on.

    Args:
        success: smallest score of a success.
        grader: of the completions; null is the prompt set's.
        strip_thinking: leave out what stands between ``<think>`` and ``</think>``.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    needs_group = True

    def __init__(
        self,
        success: float = 1.0,
        grader: Grader | None = None,
        strip_thinking: bool = True,
        wording: str = "{prompt}\n\nA correct solution:\n{information}\n\nSolve the problem in your own words.",
        template: Template | None = None,
    ) -> None:
        super().__init__(wording, template)
        self.success, self.grader, self.strip_thinking = success, grader, strip_thinking

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        siblings: Sequence[Attempt] = row.get("siblings", ())
        texts = [a.text for a in siblings if a.score >= self.success]
        told = [THINKING.sub("", text) if self.strip_thinking else text for text in texts]
        return next(({"information": text} for text in told if text.strip()), None)


class Judge(Configurable):
    """Says in words what is right or wrong about a completion."""

    @abstractmethod
    def feedback(self, row: Mapping[str, Any], completion: str, score: float) -> str | None:
        """The words, or None for nothing to say.

        Args:
            row: its columns.
            completion: the text, without special tokens.
            score: of the grader, in [0, 1].
        """


class Verdict(Judge):
    """Right or wrong, and where wanted the right answer: the feedback of an environment that only grades.

    Args:
        success: smallest score of a success.
        answer: column with the answer that is given away behind a wrong attempt; null keeps it.
        praise: say so where the attempt is right, too; else a right attempt gets no feedback.
    """

    def __init__(self, success: float = 1.0, answer: str | None = None, praise: bool = False) -> None:
        self.success, self.answer, self.praise = success, answer, praise

    def feedback(self, row: Mapping[str, Any], completion: str, score: float) -> str | None:
        if score >= self.success:
            return "This is right." if self.praise else None
        told = row.get(self.answer) if self.answer is not None else None
        return "This is wrong." if told is None else f"This is wrong. The right answer is {told}."


class Feedback(Context):
    """The row's own attempt, and what an environment or a judge says about it (SDPO, arXiv 2601.20802).

    Args:
        judge: finds the words.
        grader: of the completions; null is the prompt set's.
        wording: the teacher's prompt, with ``{prompt}``, ``{information}`` (the feedback) and ``{attempt}``.
        template: renders it; null is the student's (`data.template`).
    """

    needs_group = True

    def __init__(
        self,
        judge: Judge = Verdict(),
        grader: Grader | None = None,
        wording: str = "{prompt}\n\nAn earlier attempt:\n{attempt}\n\n{information}\n\nSolve the problem.",
        template: Template | None = None,
    ) -> None:
        super().__init__(wording, template)
        self.judge, self.grader = judge, grader

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        attempt: Attempt | None = row.get("attempt")
        words = None if attempt is None else self.judge.feedback(row, attempt.text, attempt.score)
        return None if attempt is None or words is None else {"information": words, "attempt": attempt.text}


class FirstOf(Context):
    """The first context that has something to tell about the row, such as a sibling's success, else feedback.

    Args:
        contexts: in the order in which they are tried.

    Raises:
        ValueError: for an empty list.
    """

    def __init__(self, contexts: list[Context]) -> None:
        if not contexts:
            raise ValueError("FirstOf(contexts=[]): give at least one context")
        super().__init__()
        self.contexts = contexts
        self.instance = any(c.instance for c in contexts)
        self.needs_group = any(c.needs_group for c in contexts)
        self.grader = next((c.grader for c in contexts if c.grader is not None), None)

    def within(self, template: Template) -> Template:
        inside = copy.copy(self)
        inside.contexts = [c.within(template) for c in self.contexts]  # type: ignore[misc]
        return inside

    def _chosen(self, row: Mapping[str, Any]) -> Context | None:
        return next((c for c in self.contexts if c.informed(row)), None)

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        chosen = self._chosen(row)
        return None if chosen is None else chosen.information(row)

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        return (self._chosen(row) or self.contexts[0]).text(row, tokenizer)
