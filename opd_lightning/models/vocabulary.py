"""One vocabulary for student and teacher, proven before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


class VocabularyMismatch(ValueError):
    """Student and teacher do not give the same meaning to the same token ids."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer and what the models need to know of it.

    Attributes:
        tokenizer: the student's.
        size: ids that carry a token: 1 + the largest of them. Logit rows beyond it are padding and are cut off before the
            soft-max, in scoring and in sampling.
        eos_ids: tokens that end a completion.
        pad_id: fills rows on the right; never scored.
        unk_id: stands for text that the tokenizer does not know; None where it knows everything.
        processor: gives what turns images into tensors, or says why there is none; asked only for prompts that hold some.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    unk_id: int | None = None
    processor: Callable[[], Any] | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        extra_eos: tuple[int, ...] = (),
        processor: Callable[[], Any] | None = None,
    ) -> Vocabulary:
        eos = tokenizer.eos_token_id
        pad, unk = tokenizer.pad_token_id, tokenizer.unk_token_id
        return cls(
            tokenizer=tokenizer,
            size=max(tokenizer.get_vocab().values()) + 1,
            eos_ids=tuple(dict.fromkeys([eos, *extra_eos])),
            pad_id=eos if pad is None else pad,
            unk_id=None if unk in (eos, pad, tokenizer.bos_token_id) else unk,  # byte-level vocabularies lend it a role token
            processor=processor,
        )

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """One token as it stands in a text, blanks included; its own name where it is no text by itself."""
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        text = str(self.tokenizer.decode([token]))
        if not text or "\ufffd" in text:  # bytes of a longer character
            return name
        return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def extra_eos(config: Any) -> tuple[int, ...]:
    """End-of-sequence ids that a model configuration names beside the tokenizer's."""
    eos = getattr(config, "eos_token_id", None)
    return tuple(eos) if isinstance(eos, (list, tuple)) else ()


def prove_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Every id must mean the same token to both. The teacher may have tokens behind them: they are cut off like padding.

    Returns:
        One line that names the teacher's further tokens; empty if there are none.

    Raises:
        VocabularyMismatch: with the first differing ids side by side.
    """
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (student, teacher))
    if ours == theirs:
        return ""
    further = [i for i in sorted(theirs) if i > max(ours)]
    if ours == {i: t for i, t in theirs.items() if i not in further}:
        names = ", ".join(theirs[i] for i in further[:5]) + (", ..." if len(further) > 5 else "")
        return f"{len(further)} tokens that the teacher alone has are cut off: {names}"
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    shown = "\n".join(
        f"    id {i}: student {ours.get(i, '(none)')!r}, teacher {theirs.get(i, '(none)')!r}" for i in differing[:5]
    )
    raise VocabularyMismatch(
        f"student and teacher use different tokenizers: {len(differing)} of {len(ours.keys() | theirs.keys())} ids differ, "
        f"for example\n{shown}\n  Choose a teacher of the student's family (model.teacher.path), or let it read the student's "
        "text in its own tokens: `model.teacher: CrossTokenizerTeacher` with `support: MatchedVocab` (see "
        "experiments/cross_tokenizer.yaml)."
    )


def special_differences(ours: Vocabulary, theirs: Vocabulary, name: str) -> list[str]:
    """What two models with one vocabulary use differently: ends and beginnings of a text, chat templates.

    Args:
        ours: the student's.
        theirs: of the other model.
        name: of that model.
    """
    out = []
    for who, extra in (
        (name, sorted(set(theirs.eos_ids) - set(ours.eos_ids))),
        ("the student", sorted(set(ours.eos_ids) - set(theirs.eos_ids))),
    ):
        if extra:
            spelled = [_token(ours, i) or _token(theirs, i) or f"id {i}" for i in extra]
            out.append(f"EOS: {', '.join(spelled)} ends a text for {who} alone")
    begins = ours.tokenizer.bos_token, theirs.tokenizer.bos_token
    if begins[0] != begins[1]:
        out.append(
            f"BOS: a text begins with {begins[0]} for the student and with {begins[1]} for {name}; both read the student's"
        )
    if theirs.tokenizer.chat_template != ours.tokenizer.chat_template:
        out.append(f"template: {name} was trained with another chat template; both read the student's")
    return out


def _token(vocabulary: Vocabulary, i: int) -> str | None:
    """The token of an id; None for one that has none, as the -1 of a model whose text never ends by itself."""
    found: Any = vocabulary.tokenizer.convert_ids_to_tokens(i) if i >= 0 else None
    return None if found is None else str(found)


def prove_rows(vocabulary: Vocabulary, rows: dict[str, int]) -> str:
    """Every token must have a logit row in every model; rows beyond the tokens are padding.

    Args:
        vocabulary: the shared one.
        rows: logit rows of each model, by name.

    Returns:
        One line that says what is cut off.

    Raises:
        VocabularyMismatch: if a model has fewer rows than there are tokens.
    """
    for name, count in rows.items():
        if count < vocabulary.size:
            raise VocabularyMismatch(
                f"the {name} has {count} logit rows, but the tokenizer's largest id is {vocabulary.size - 1}: some tokens "
                f"have no row. Resize its embeddings, or use the tokenizer it was trained with (model.{name}.path)."
            )
    padded = {name: count - vocabulary.size for name, count in rows.items() if count > vocabulary.size}
    if not padded:
        return f"vocabulary: {vocabulary.size} tokens"
    cut = ", ".join(f"{count} of the {name}" for name, count in padded.items())
    return f"vocabulary: {vocabulary.size} tokens; padding rows cut off before the soft-max: {cut}"


def prove_shared(vocabulary: Vocabulary, rows: int, models: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Every model must give the same meaning to the same ids, and have a row for each; or translate, and prove that.

    Args:
        vocabulary: the student's.
        rows: logit rows of the student.
        models: the teachers that are asked, by name.

    Returns:
        One line that says what is cut off, and what differs without harm, a line each.

    Raises:
        VocabularyMismatch: naming what differs.
    """
    counts, lines, notes = {"student": rows}, [], []
    for name, model in models.items():
        if model.translation is not None:
            lines.append(model.translation.prove())
            prove_rows(model.translation.theirs, {name: model.rows() or 0})
            continue
        if (theirs := model.tokenizer()) is not None:
            found = [prove_same_tokens(vocabulary.tokenizer, theirs)]
            found += special_differences(vocabulary, Vocabulary.of(theirs, extra_eos(model.config())), name)
            notes += [f"{note} (model.{name}; `opd inspect-pair` shows what both read)" for note in found if note]
        model.meet(vocabulary)
        if (their_rows := model.rows()) is not None:
            counts[name] = their_rows
    return "\n".join([*lines, prove_rows(vocabulary, counts)]), notes
