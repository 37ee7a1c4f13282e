"""What student and teacher read for the same row, side by side, and where the two differ in more than information."""

from __future__ import annotations

import difflib
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.data.group_contexts import Attempt
from opd_lightning.inspect.setups import Setup
from opd_lightning.models.vocabulary import Vocabulary, extra_eos, special_differences

THINKING = ("<think>", "</think>")


def show(setup: Setup, rows: int, width: int) -> str:
    """Both prompts of the first rows in two columns, and what differs.

    Args:
        setup: the run; no weights are loaded.
        rows: how many rows of the training set.
        width: of the page, in characters.
    """
    data, module = setup.data, setup.module
    tokenizer, translation = module.vocabulary.tokenizer, module.teacher.translation
    reads = translation.theirs.tokenizer if translation is not None else tokenizer
    out = []
    for number, row in enumerate(data.prompt_set.rows()[:rows]):
        student = data.template.text(row, tokenizer)
        theirs, note = teacher_text(data, row, reads)
        out += [f"row {number}{note}", *columns(student, theirs, width), ""]
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        out += [f"  ! {line}" for line in prompt_differences(student, theirs, student.rpartition(asked)[2])]
    out += ["", *model_lines(setup)]
    return "\n".join(out)


def teacher_text(data: PromptDataModule, row: Mapping[str, Any], tokenizer: Any) -> tuple[str | None, str]:
    """The teacher's prompt, None where it is told nothing, with a note. For contexts that need the group, the row's own
    completion stands for a sibling's success and a made-up text for the row's attempt.
    """
    template = data.teacher_template
    if template is None:
        return data.template.text(row, tokenizer), " (the teacher reads what the student reads)"
    note = ""
    if data.gathers:
        sibling = [Attempt(1, str(row["completion"]), 1.0)] if row.get("completion") else []
        row = {**row, "attempt": Attempt(0, "(what the student wrote)", 0.0), "siblings": sibling}
        note = " (with a made-up attempt; the data set's completion stands for a sibling's success)"
    if not template.informed(row):
        return None, f"{note} (the teacher has nothing to be told: written, but not trained on)"
    return template.text(row, tokenizer), note


def columns(student: str, teacher: str | None, width: int) -> list[str]:
    """Two columns; ``+`` marks what only the teacher reads, ``-`` what only the student reads, ``|`` lines that differ."""
    half = (width - 5) // 2
    ours, theirs = (_wrapped(text, half) for text in (student, teacher if teacher is not None else "(nothing)"))
    lines = [f"{'student':<{half}}     teacher", f"{'-' * half}     {'-' * half}"]
    matcher = difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for left, right in itertools.zip_longest(ours[a:b], theirs[c:d]):
            mark = "+" if left is None else "-" if right is None else " " if kind == "equal" else "|"
            lines.append(f"{left or '':<{half}}  {mark}  {right or ''}".rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of the text, the line breaks shown."""
    out = []
    for line in text.replace("\n", "\\n\n").splitlines():
        out += textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
    return out


def prompt_differences(student: str, teacher: str | None, ending: str) -> list[str]:
    """Differences that are not information: where the completion begins, thinking mode.

    Args:
        student: its prompt.
        teacher: its prompt; None where it is told nothing.
        ending: what the template puts behind the question, before the completion.
    """
    if teacher is None:
        return []
    out = []
    if not teacher.endswith(ending):
        there = teacher[-max(len(ending), 10) :]
        out.append(f"template: the student's completion begins behind {ending!r}, the teacher's behind {there!r}")
    for word in THINKING:
        if (count := student.count(word)) != (other := teacher.count(word)):
            out.append(f"thinking mode: {word} stands {count} times in the student's prompt and {other} times in the teacher's")
    return out


def model_lines(setup: Setup) -> list[str]:
    """What ends a completion, and the chat templates, of every network that is asked."""
    ours = setup.module.vocabulary
    names: Any = ours.tokenizer.convert_ids_to_tokens
    lines = [f"the student ends with {', '.join(names(list(ours.eos_ids)))}"]
    for name, leaf in setup.module._leaves().items():
        tokenizer = leaf.tokenizer()
        if tokenizer is None:
            lines.append(f"{name} {type(leaf).__name__}: the student's tokenizer by construction")
            continue
        if leaf.translation is not None:
            lines.append(f"{name} {type(leaf).__name__}: {leaf.translation.prove()}")
            continue
        theirs = Vocabulary.of(tokenizer, extra_eos(leaf.config()))
        lines.append(f"{name} {type(leaf).__name__} ends with {', '.join(names(list(theirs.eos_ids)))}")
        lines += [f"  ! {line}" for line in special_differences(ours, theirs, name)]
    options = [getattr(t, "options", {}) for t in (setup.data.template, setup.data.teacher_template)]
    if options[1] and options[0] != options[1]:
        lines.append(f"  ! template options: {options[0]} for the student, {options[1]} for the teacher")
    return lines
