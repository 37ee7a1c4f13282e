"""What only the teacher is told: privileged information (PI), from the columns of a row.

A context is a template for the teacher (`data.teacher_template`): it adds information to the row's prompt and has the student's
own template render the result, so that nothing else differs between the two. Rows without the information are not trained on.
"""

from __future__ import annotations

import copy
import random
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.data.templates import AutoTemplate, ChatTemplate, Template
from opd_lightning.metrics.graders import Grader
from opd_lightning.seeds import fold

__all__ = [
    "AnswerOnly",
    "Context",
    "CustomContext",
    "Demonstration",
    "Hint",
    "Instruction",
    "MaskedSolution",
    "ReferenceSolution",
    "SystemPrompt",
]

PLACE = re.compile(r"\{(\w+)\}")


def filled(wording: str, values: Mapping[str, Any]) -> str:
    """``{name}`` replaced by its value, in one pass: braces inside values are text.

    >>> filled("{prompt} ({hint})", {"prompt": "{hint}?", "hint": "h"})
    '{hint}? (h)'
    """
    return PLACE.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], wording)


class Context(Template):
    """Adds information to the prompt. Subclass it for your own: `information` is the method that must be written.

    Attributes:
        instance: the information differs from row to row, so the student can never know it: the divergence has a floor.
        needs_group: it is made from completions of the group, after they were written and graded.

    Args:
        wording: the teacher's prompt, with ``{prompt}`` and a place for what `information` names.
        template: renders it; null is the student's (`data.template`).

    Raises:
        ValueError: if the wording lacks a place.
    """

    instance: bool = True
    needs_group: bool = False
    grader: Grader | None = None

    def __init__(self, wording: str = "{prompt}\n\n{information}", template: Template | None = None) -> None:
        places = set(PLACE.findall(wording))
        if "prompt" not in places or len(places) < 2:
            raise ValueError(
                f"{type(self).__name__}(wording={wording!r}): it must hold {{prompt}} and a place for what the teacher is told"
            )
        self.wording, self.template, self.places = wording, template, places - {"prompt"}

    @abstractmethod
    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        """What the teacher is told about a row, for the places of the wording; None where there is nothing to tell.

        Args:
            row: its columns. For contexts that need the group also ``attempt`` and ``siblings`` (see `group_contexts`).
        """

    def within(self, template: Template) -> Template:
        inside = copy.copy(self)
        inside.template = self.template or template
        return inside

    def informed(self, row: Mapping[str, Any]) -> bool:
        return self.information(row) is not None

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        told = self.information(row)
        if told is None:
            raise ValueError(f"{type(self).__name__} has nothing to tell about {str(row['prompt'])[:60]!r}")
        return self.text_with(told, row, tokenizer)

    def text_with(self, told: Mapping[str, str], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        """The row's prompt with any information: that of another row, to see what it would have done to the teacher."""
        return (self.template or AutoTemplate()).text({**row, "prompt": self._reworded(row["prompt"], told)}, tokenizer)

    def _reworded(self, prompt: Any, told: Mapping[str, str]) -> Any:
        """The last message of a conversation, or the text, with the information; images stay where they are."""
        if isinstance(prompt, str):
            return filled(self.wording, {**told, "prompt": prompt})
        if all("content" not in part for part in prompt):  # the typed parts of one message: what is shown stays as it is
            place = max((i for i, part in enumerate(prompt) if part.get("type") == "text"), default=None)
            if place is None:
                return [*prompt, {"type": "text", "text": filled(self.wording, {**told, "prompt": ""}).strip()}]
            spoken = {**prompt[place], "text": self._reworded(prompt[place]["text"], told)}
            return [*prompt[:place], spoken, *prompt[place + 1 :]]
        *before, last = prompt
        return [*before, {**last, "content": self._reworded(last["content"], told)}]


class SystemPrompt(Context):
    """The same system message for every row (context distillation, OPCD arXiv 2602.12275): a rule that a student can learn.

    Where the template has no system message, the text stands in front of the prompt.

    Args:
        content: of the system message.
        template: renders the prompt; null is the student's (`data.template`). A system message of its own is replaced.
    """

    instance = False

    def __init__(self, content: str, template: Template | None = None) -> None:
        super().__init__("{information}\n{prompt}", template)
        self.content = content

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        return {"information": self.content}

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        frame = self.template or AutoTemplate()
        if isinstance(frame, AutoTemplate) and tokenizer.chat_template is not None:
            frame = ChatTemplate()
        if not isinstance(frame, ChatTemplate):
            return super().text(row, tokenizer)
        spoken = copy.copy(frame)
        spoken.system = self.content
        return spoken.text(row, tokenizer)


class Instruction(Context):
    """The same instruction behind every prompt, such as to be concise (OPSDC, arXiv 2603.05433).

    Args:
        content: of the instruction.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    instance = False

    def __init__(self, content: str, wording: str = "{prompt}\n\n{information}", template: Template | None = None) -> None:
        super().__init__(wording, template)
        self.content = content

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        return {"information": self.content}


class ColumnContext(Context):
    """The text of a column; rows without it have no information."""

    def __init__(self, column: str, wording: str, template: Template | None = None) -> None:
        super().__init__(wording, template)
        self.column = column

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        found = row.get(self.column)
        return None if found is None or not str(found).strip() else {"information": str(found)}


class ReferenceSolution(ColumnContext):
    """A written solution (OPSD, arXiv 2601.18734).

    Args:
        column: of the row, with the solution.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    def __init__(
        self,
        column: str = "completion",
        wording: str = "{prompt}\n\nA correct solution:\n{information}\n\nSolve the problem in your own words.",
        template: Template | None = None,
    ) -> None:
        super().__init__(column, wording, template)


class AnswerOnly(ColumnContext):
    """The final answer without its derivation (RLSD, arXiv 2604.03128).

    Args:
        column: of the row, with the answer.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    def __init__(
        self,
        column: str = "answer",
        wording: str = "{prompt}\n\nThe final answer is {information}.",
        template: Template | None = None,
    ) -> None:
        super().__init__(column, wording, template)


class Hint(ColumnContext):
    """A hint that came with the data.

    Args:
        column: of the row, with the hint.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    def __init__(
        self, column: str = "hint", wording: str = "{prompt}\n\nHint: {information}", template: Template | None = None
    ) -> None:
        super().__init__(column, wording, template)


class Demonstration(ColumnContext):
    """An example of a good response to this very prompt, to be followed in manner (SDFT, arXiv 2601.19897).

    Args:
        column: of the row, with the example.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
    """

    def __init__(
        self,
        column: str = "completion",
        wording: str = "{prompt}\n\nSomebody answered this:\n{information}\n\nNow answer yourself.",
        template: Template | None = None,
    ) -> None:
        super().__init__(column, wording, template)


class MaskedSolution(ColumnContext):
    """A written solution with some of its words and numbers hidden, the same ones each time.

    Args:
        share: of the words that are hidden, in (0, 1).
        column: of the row, with the solution.
        wording: the teacher's prompt, with ``{prompt}`` and ``{information}``.
        template: renders it; null is the student's (`data.template`).
        blank: stands for a hidden word.
        seed: of the choice.

    Raises:
        ValueError: for a share outside (0, 1).
    """

    WORD = re.compile(r"\w+")

    def __init__(
        self,
        share: float = 0.5,
        column: str = "completion",
        wording: str = "{prompt}\n\nA correct solution, with gaps:\n{information}\n\nSolve the problem in your own words.",
        template: Template | None = None,
        blank: str = "___",
        seed: int = 0,
    ) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"MaskedSolution(share={share}): must lie between 0 and 1, both excluded")
        super().__init__(column, wording, template)
        self.share, self.blank, self.seed = share, blank, seed

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        told = super().information(row)
        if told is None:
            return None
        solution = told["information"]
        words = list(self.WORD.finditer(solution))
        chosen = random.Random(fold(self.seed, "mask", solution)).sample(range(len(words)), round(self.share * len(words)))
        for word in sorted((words[i] for i in chosen), key=lambda m: -m.start()):
            solution = solution[: word.start()] + self.blank + solution[word.end() :]
        return {"information": solution}


class CustomContext(Context):
    """A wording of your own over any columns of the row; a row that lacks one of them has no information.

    Args:
        wording: the teacher's prompt, with ``{prompt}`` and ``{column}`` for any column.
        instance: whether the information differs from row to row.
        template: renders it; null is the student's (`data.template`).

    Raises:
        ValueError: if the wording names no column beside the prompt.
    """

    def __init__(self, wording: str, instance: bool = True, template: Template | None = None) -> None:
        super().__init__(wording, template)
        self.instance = instance

    def information(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        found = {place: row.get(place) for place in self.places}
        return None if None in found.values() else {place: str(value) for place, value in found.items()}
