"""What a processor made of the images of a prompt: tensors that travel beside its tokens, row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Media:
    """The extra inputs of one prompt, as the model's forward pass names them.

    Attributes:
        whole: tensors with one entry an image or a patch along the first dimension: those of several prompts are put below
            each other, never padded (pixel values, grids).
        tokens: (P,) one number a prompt token, 0 for plain text; padded like the tokens themselves (token types).
    """

    whole: dict[str, Tensor]
    tokens: dict[str, Tensor]

    @property
    def shows(self) -> bool:
        """Whether there is anything to look at: grids and sizes alone are nothing."""
        return any(x.is_floating_point() for x in self.whole.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> Media:
        return Media({k: fn(x) for k, x in self.whole.items()}, {k: fn(x) for k, x in self.tokens.items()})

    def digest(self) -> str:
        """Hash of names and values."""
        found = hashlib.sha256()
        for name, x in sorted((self.whole | self.tokens).items()):
            found.update(f"{name}{tuple(x.shape)}".encode())
            found.update(x.detach().cpu().double().contiguous().numpy().tobytes())
        return found.hexdigest()


Shown = tuple[Media | None, ...]
"""One a row; None for a row of text alone."""


def digests(*shown: Media | None) -> list[str]:
    """The hashes of what is there; empty where nothing is, so that text alone is named as ever."""
    return [m.digest() for m in shown if m is not None]


def beside(shown: Sequence[Media | None]) -> dict[str, Any]:
    """The further argument of a sampler's ``write``: none for text alone, which samplers that never look may go on to write."""
    return {"media": shown} if any(m is not None for m in shown) else {}


def mapped(shown: Shown | None, fn: Callable[[Tensor], Tensor]) -> Shown | None:
    """Apply ``fn`` to every tensor, once for rows that share them (the group of a prompt)."""
    if shown is None:
        return None
    done = {id(m): m.map(fn) for m in shown if m is not None}
    return tuple(None if m is None else done[id(m)] for m in shown)


def joined(parts: Sequence[tuple[int, Shown | None]]) -> Shown | None:
    """Rows below each other, from (number of rows, what they are shown) pairs."""
    if all(shown is None for _, shown in parts):
        return None
    return tuple(m for rows, shown in parts for m in (shown or (None,) * rows))


def plain(shown: Shown | None) -> list[Any] | None:
    """Plain data on the CPU, for a checkpoint; rows that share tensors share them in the file."""
    shown = mapped(shown, lambda x: x.cpu())
    return None if shown is None else [m and {"whole": m.whole, "tokens": m.tokens} for m in shown]


def unplain(state: Sequence[Any] | None) -> Shown | None:
    """Inverse of `plain`."""
    return None if state is None else tuple(m and Media(**m) for m in state)


def batched(shown: Sequence[Media | None], starts: Sequence[int], width: int) -> dict[str, Tensor]:
    """The inputs of a batch of rows, by name.

    Args:
        shown: one a row.
        starts: place of each row's first token: 0 where rows are padded on the right.
        width: of the batch.

    Raises:
        ValueError: for images whose tensors cannot be put below each other.
    """
    there = [(row, m) for row, m in enumerate(shown) if m is not None]
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for _, m in there for n in m.whole):
        pieces = [m.whole[name] for _, m in there if name in m.whole]
        if len({x.shape[1:] for x in pieces}) > 1:
            shapes = ", ".join(sorted({str(tuple(x.shape)) for x in pieces}))
            raise ValueError(
                f"{name} of these prompts cannot be put below each other: {shapes}. Give all images one size and all prompts "
                "equally many (data.prompts), or take data.micro_batch_size=1 with rollout.sampler.batch_size=1"
            )
        out[name] = torch.cat(pieces)
    for name in dict.fromkeys(n for _, m in there for n in m.tokens):
        example = next(m.tokens[name] for _, m in there if name in m.tokens)
        rows = example.new_zeros(len(shown), width)
        for row, m in there:
            if name in m.tokens:
                rows[row, starts[row] : starts[row] + len(m.tokens[name])] = m.tokens[name]
        out[name] = rows
    return out
