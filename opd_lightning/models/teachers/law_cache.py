"""What a teacher server has said: the laws that follow from it, and answers kept on disk under the hash of the question."""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_lightning.ops.logprobs import tail_logmass

SAME = 0.05
"""Mean difference, nats, up to which two answers to one question are taken for those of the same weights. Rounding to bfloat16
makes 0.005 on average (see `NativeSampler`); weights that moved less than this are not noticed."""


class Question(NamedTuple):
    """A row to be scored.

    Attributes:
        ids: prompt and completion, as the teacher's own template rendered them.
        start: place of the first completion token, from 1.
    """

    ids: tuple[int, ...]
    start: int

    def key(self) -> str:
        """Hash of the tokens and of where the completion begins. The template is in the tokens."""
        words = torch.tensor([self.start, *self.ids], dtype=torch.int64).numpy().tobytes()
        return hashlib.sha256(words).hexdigest()


class Answer(NamedTuple):
    """The laws at the completion tokens of one row.

    Attributes:
        ids: (T, K) int32, the likeliest tokens, likeliest first.
        logprobs: (T, K) float32. What they leave of 1 is the tail's mass.
        token_logprobs: (T,) float32, of the drawn tokens.
    """

    ids: Tensor
    logprobs: Tensor
    token_logprobs: Tensor


@dataclass(frozen=True)
class TopKLaws:
    """Laws of which the likeliest entries and the drawn token are known. See `opd_lightning.types.TokenLaws`.

    What is not known shares the rest of the mass evenly: sums over known entries and the tail's mass are exact, and nothing
    that looks at single entries of the tail may be asked.

    Attributes:
        ids: (N, K) the likeliest entries, likeliest first; ids beyond the vocabulary stand for nothing.
        logprobs: (N, K) theirs.
        tokens: (N,) the drawn tokens, which may be among ``ids``.
        token_logprobs: (N,) theirs.
        vocab: entries of every law.
    """

    ids: Tensor
    logprobs: Tensor
    tokens: Tensor
    token_logprobs: Tensor
    vocab: int

    def __len__(self) -> int:
        return len(self.tokens)

    def logits(self, start: int, stop: int) -> Tensor:
        ids, tokens = self.ids[start:stop], self.tokens[start:stop, None]
        top, drawn = self.logprobs[start:stop], self.token_logprobs[start:stop, None]
        apart = ~(ids == tokens).any(-1, keepdim=True)
        real = ids < self.vocab
        known = torch.cat([top.masked_fill(~real, -torch.inf), drawn.masked_fill(~apart, -torch.inf)], -1)
        others = (self.vocab - real.sum(-1) - apart[:, 0].long()).clamp(min=1)
        rest = tail_logmass(known) - others.to(known.dtype).log()
        law = rest[:, None].expand(-1, self.vocab).clone()
        law.scatter_(-1, torch.where(real, ids, tokens), torch.where(real, top, drawn))
        return law.scatter_(-1, tokens, drawn)


class LawCache:
    """Answers of one teacher: one small file a row, written whole or not at all, so that runs may share the folder.

    Weights that change under one name are noticed: the answer to a fixed question is kept too, and where it differs from what
    the server says now, a new generation is begun.

    Args:
        folder: of all teachers.
        identity: names and settings that the answers depend on.
        probe: the server's answer to a fixed question.
    """

    def __init__(self, folder: Path, identity: str, probe: Answer) -> None:
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        for generation in range(1000):
            self.folder = folder / f"{name}-{generation}"
            before = _read(self.folder / "probe.safetensors")
            if before is None:
                self.put("probe", probe)
                (self.folder / "teacher.txt").write_text(identity + "\n", encoding="utf-8")
                return
            if (moved := _difference(before, probe)) <= SAME:
                return
            rank_zero_warn(
                f"the teacher server answers otherwise than when {self.folder} was filled ({moved:.2g} nats on average): other "
                "weights under the same name. What is kept there is not used"
            )
        raise RuntimeError(f"{folder} holds a thousand generations of {identity!r}: delete those that nobody needs")

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors" if key == "probe" else self.folder / key[:2] / f"{key}.safetensors"

    def get(self, question: Question) -> Answer | None:
        return _read(self._file(question.key()))

    def put(self, key: str, answer: Answer) -> None:
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        save_file({name: x.contiguous() for name, x in answer._asdict().items()}, partial)
        os.replace(partial, file)


def _read(file: Path) -> Answer | None:
    try:
        return Answer(**load_file(file))
    except FileNotFoundError:
        return None
    except (SafetensorError, TypeError) as error:
        rank_zero_warn(f"{file} is damaged ({error}): the server is asked again")
        return None


def _difference(a: Answer, b: Answer) -> float:
    if a.token_logprobs.shape != b.token_logprobs.shape:
        return float("inf")
    return float((a.token_logprobs - b.token_logprobs).abs().mean())
