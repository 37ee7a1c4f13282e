"""From a row to the tokens that a model continues."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.configurable import Configurable

__all__ = ["AutoTemplate", "ChatTemplate", "PlainTemplate", "Template"]


def encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Tokens of texts that hold their special tokens already, in one call: text by text takes ten times as long."""
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []


class Template(Configurable, ABC):
    """Renders the ``prompt`` of a row: a text, or a list of chat messages."""

    def within(self, template: Template) -> Template:
        """The same for a teacher whose student reads `template`."""
        return self

    def informed(self, row: Mapping[str, Any]) -> bool:
        """Whether the row holds all that this template says."""
        return True

    @abstractmethod
    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        """The rendered prompt, special tokens included."""

    def ids(self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
        """Tokens of the rendered prompts."""
        return encoded([self.text(row, tokenizer) for row in rows], tokenizer)


class PlainTemplate(Template):
    """The text itself between a prefix and a suffix, opened by the tokenizer's BOS where it has one.

    Args:
        prefix: in front of every prompt.
        suffix: behind every prompt.
    """

    def __init__(self, prefix: str = "", suffix: str = "") -> None:
        self.prefix, self.suffix = prefix, suffix

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            raise ValueError("PlainTemplate needs a text in `prompt`, got chat messages: use ChatTemplate (data.template)")
        return f"{tokenizer.bos_token or ''}{self.prefix}{prompt}{self.suffix}"


class ChatTemplate(Template):
    """The tokenizer's own chat template, ending where the assistant begins.

    Args:
        system: system message; null leaves the template's own default.
        shots: demonstrations, as [user, assistant] pairs before the prompt.
        options: further variables of the template, e.g. ``{enable_thinking: false}``.
    """

    def __init__(
        self,
        system: str | None = None,
        shots: list[list[str]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.system, self.shots, self.options = system, shots or [], options or {}
        for shot in self.shots:
            if len(shot) != 2:
                raise ValueError(f"ChatTemplate.shots: every demonstration is a [user, assistant] pair, got {shot!r}")

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: use `data.template: PlainTemplate`, or a chat model (model.student.path)"
            )
        prompt = row["prompt"]
        messages: list[Any] = [{"role": "system", "content": self.system}] if self.system is not None else []
        for user, assistant in self.shots:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **self.options))


class AutoTemplate(Template):
    """`ChatTemplate` if the tokenizer has a chat template, else `PlainTemplate`."""

    def text(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        template = ChatTemplate() if tokenizer.chat_template is not None else PlainTemplate()
        return template.text(row, tokenizer)
