"""A student's text in a teacher's tokens: bytes are what two tokenizers share.

Two tokenizers cut one text at different places. Where both begin a token at the same byte, both models have read the same text
and their next-token laws can be compared; everywhere else only one of them has a law. Tokens that spell the same bytes are one
token to both.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.models.vocabulary import Vocabulary, VocabularyMismatch
from opd_lightning.types import Completion, Prompt, Rendering, Rollout, TokenLaws

__all__ = ["Reading", "TranslatedLaws", "Translation", "token_bytes"]

PROBED = 200
"""Shared tokens whose joined text a teacher's tokenizer must give back byte for byte."""


def _byte_level() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes (GPT-2): printable Latin-1 stands for itself, the rest for
    itself above 255, in order.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


BYTE_LEVEL = _byte_level()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that every id spells; None for special tokens and for ids without a token.

    Raises:
        VocabularyMismatch: for a tokenizer whose tokens do not stand for bytes of the text (WordPiece, a Python tokenizer).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "Python"}}
    decoder = json.dumps(kind.get("decoder"))
    if kind["model"].get("type") in ("WordPiece", "Python") or "WordPiece" in decoder:
        raise VocabularyMismatch(
            f"a {kind['model'].get('type')} tokenizer ({type(tokenizer).__name__}) does not keep the bytes of a text: student "
            "and teacher of different tokenizers need byte-level BPE, SentencePiece or character tokenizers"
        )
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    vocab = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in special or (i in added and added[i].special):
            continue
        if i in added:
            out[i] = added[i].content.encode()
        elif '"ByteLevel"' in decoder:
            out[i] = bytes(BYTE_LEVEL[c] for c in token) if all(c in BYTE_LEVEL for c in token) else token.encode()
        elif "\u2581" in decoder or "\\u2581" in decoder or '"Metaspace"' in decoder:
            raw = token[3:5] if token.startswith("<0x") and token.endswith(">") and len(token) == 6 else ""
            out[i] = bytes.fromhex(raw) if raw else token.replace("\u2581", " ").encode()
        else:
            out[i] = token.encode()
    return out


class Reading(NamedTuple):
    """A completion in the teacher's tokens.

    Attributes:
        ids: the teacher's tokens.
        ours, theirs: numbers of the student's and of the teacher's tokens that begin at the same byte; equally many.
    """

    ids: tuple[int, ...]
    ours: tuple[int, ...]
    theirs: tuple[int, ...]


@dataclass(frozen=True)
class TranslatedLaws:
    """A teacher's laws in the order of the student's vocabulary. See `opd_lightning.types.TokenLaws`.

    Entry v < V is the teacher's token that spells what the student's token v spells, -inf if there is none. Behind them stand
    the teacher's tokens that the student does not have, so that the whole row is the teacher's law.

    Attributes:
        law: over the teacher's vocabulary.
        columns: (V + U,) the teacher's id of every entry; the teacher's size where there is none.
        matched: (V,) True where there is one.
    """

    law: TokenLaws
    columns: Tensor
    matched: Tensor

    def __len__(self) -> int:
        return len(self.law)

    @property
    def vocab(self) -> int:
        return len(self.matched)

    def logits(self, start: int, stop: int) -> Tensor:
        logits = self.law.logits(start, stop)
        return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).index_select(-1, self.columns)


@dataclass(frozen=True)
class Translation:
    """Between two vocabularies.

    Attributes:
        ours: the student's.
        theirs: the teacher's.
    """

    ours: Vocabulary
    theirs: Vocabulary

    @cached_property
    def _spelled(self) -> tuple[list[bytes | None], list[bytes | None]]:
        return token_bytes(self.ours.tokenizer), token_bytes(self.theirs.tokenizer)

    @cached_property
    def partner(self) -> list[int]:
        """The teacher's id of every student id; -1 if it has none. Ends of text are partners of each other."""
        ours, theirs = (
            [spelled or names[i] for i, spelled in enumerate(found)]  # special tokens by their names
            for found, names in zip(self._spelled, (_names(self.ours), _names(self.theirs)), strict=True)
        )
        ends = self.ours.eos_ids[0], self.theirs.eos_ids[0]
        ids: dict[bytes | str, list[int]] = defaultdict(list)
        for i in reversed(range(self.theirs.size)):
            if i != ends[1]:
                ids[theirs[i]].append(i)
        out = [ids[key].pop() if i != ends[0] and key and ids[key] else -1 for i, key in enumerate(ours)]
        out[ends[0]] = ends[1]
        return out

    @cached_property
    def columns(self) -> Tensor:
        """(V + U,) see `TranslatedLaws`."""
        found = set(self.partner)
        rest = [i for i in range(self.theirs.size) if i not in found]
        return torch.tensor([self.theirs.size if i < 0 else i for i in self.partner] + rest)

    @cached_property
    def matched(self) -> Tensor:
        """(V,) the student's tokens that the teacher has too."""
        return torch.tensor(self.partner) >= 0

    def prove(self) -> str:
        """One line that says what is shared.

        Raises:
            VocabularyMismatch: if the teacher's tokenizer does not keep the bytes of a text, or no token is shared.
        """
        shared = [p for p in self.partner if p >= 0]
        spelled = [self._spelled[1][p] for p in shared]
        words = [s.decode() for s in spelled if s and s.isascii()][:PROBED]
        if not words:
            raise VocabularyMismatch("student and teacher share no token that spells a text: nothing could be compared")
        text = "".join(words)
        if (back := b"".join(self._bytes_of(self.encode(text)))) != text.encode():
            raise VocabularyMismatch(
                f"the teacher's tokenizer turns {text[:20]!r} into {back.decode(errors='replace')[:20]!r}: one that changes a "
                "text, or puts something before it, cannot be aligned with the student's byte by byte (model.teacher.path)"
            )
        return (
            f"two tokenizers: {len(shared)} tokens are in both vocabularies, {self.ours.size - len(shared)} in the student's "
            f"alone, {self.theirs.size - len(shared)} in the teacher's alone"
        )

    def encode(self, text: str) -> list[int]:
        """The teacher's tokens of a text."""
        found: list[int] = self.theirs.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """Bytes of the teacher's tokens up to the first that spells none."""
        out = []
        for i in ids:
            if (spelled := self._spelled[1][i]) is None:
                break
            out.append(spelled)
        return out

    def read(self, ids: Sequence[int]) -> Reading:
        """A completion of the student in the teacher's tokens, and where the two meet.

        Behind a special token, or a byte that is no text, nothing meets any more.
        """
        pieces: list[bytes] = []
        for i in ids:
            if i >= len(self._spelled[0]) or (spelled := self._spelled[0][i]) is None:
                break
            pieces.append(spelled)
        text = b"".join(pieces)
        theirs = self.encode(text.decode(errors="replace"))
        their_pieces = self._bytes_of(theirs)
        back = b"".join(their_pieces)
        same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        begun = [*_starts(their_pieces), len(back)][: len(theirs)]  # a token that spells nothing (<unk>) begins somewhere too
        starts = {start: u for u, start in enumerate(begun) if start <= same}
        meet = [(t, starts[start]) for t, start in enumerate(_starts(pieces)) if start in starts]
        ended = len(pieces) == len(ids) - 1 and ids[-1] in self.ours.eos_ids
        if ended and text == back and len(their_pieces) == len(theirs):
            meet.append((len(pieces), len(theirs)))
            theirs = [*theirs, self.theirs.eos_ids[0]]
        return Reading(tuple(theirs), tuple(t for t, _ in meet), tuple(u for _, u in meet))

    def applied(self, rollout: Rollout, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rollout:
        """The rollout with the teacher's own tokens beside it, and only the positions at which the two meet in the masks.

        Raises:
            ValueError: for prompts without the teacher's tokens.
        """
        readings = [self.read(c.ids) for c in completions]
        begun = [p.teacher_ids for p in prompts if p.teacher_ids is not None]
        if len(begun) < len(prompts):
            raise ValueError(
                "a prompt lacks the teacher's tokens, and its tokenizer is not the student's: let PromptDataModule make the "
                "prompts (outside a Trainer set `datamodule.teacher_tokenizer`)"
            )
        theirs = Rendering.of(begun, [r.ids for r in readings], self.theirs.pad_id)
        text = replace(rollout.text, mask=_only(rollout.text.mask, [r.ours for r in readings]))
        return replace(
            rollout,
            text=text,
            teacher_text=replace(theirs, mask=_only(theirs.mask, [r.theirs for r in readings])),
            unaligned=rollout.mask & ~text.mask,
        )

    def laws(self, law: TokenLaws, device: Any) -> TranslatedLaws:
        return TranslatedLaws(law, self.columns.to(device), self.matched.to(device))


def _names(vocabulary: Vocabulary) -> list[str]:
    """The token of every id; empty where there is none."""
    out = [""] * vocabulary.size
    for token, i in vocabulary.tokenizer.get_vocab().items():
        out[i] = token
    return out


def _starts(pieces: Sequence[bytes]) -> list[int]:
    """Where each piece begins; a piece of no bytes begins nowhere."""
    out, at = [], 0
    for piece in pieces:
        out.append(at if piece else -1)
        at += len(piece)
    return out


def _only(mask: Tensor, numbers: Sequence[Sequence[int]]) -> Tensor:
    """The mask with only some completion tokens of each row, numbered from 0."""
    out = torch.zeros_like(mask)
    for b, chosen in enumerate(numbers):
        places = mask[b].nonzero().squeeze(-1)
        out[b, places[list(chosen)]] = True
    return out
