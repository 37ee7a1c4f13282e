"""From logits to tokens: the law that is sampled, and draws from it with one uniform number a row.

From a vocabulary that is not cut a C function draws (`draws.c`) where there is one: the first token, in vocabulary order, at
which the running sum passes the row's share of the whole. PyTorch draws the same, but for rounding.
"""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lightning.compiling import INT, LONG, POINTER, built, vectors

SOURCE = Path(__file__).with_name("draws.c")

BLOCK = 256
"""Entries that are summed before the search: about the square root of a large vocabulary, so both levels are short."""

SHORT = 2048
"""Vocabulary up to which one sum is faster in PyTorch than two levels of them."""

CHUNK = 2**19
"""Entries that are drawn from at once on a CPU: what one pass writes is still in its cache when the next one reads it."""


class Draws(ctypes.Structure):
    """`Draws` of the C source."""

    _fields_ = (
        *((name, POINTER) for name in ("logits", "uniforms", "tokens", "logprobs")),
        *((name, ctypes.c_int64) for name in ("apart", "size", "steps", "half")),
        ("scale", ctypes.c_float),
    )
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Draws, Tensor, Tensor]:
        """With room for tokens and log-probabilities (rows, steps).

        Args:
            logits: (rows, V), float32 or bfloat16.
            uniforms: (rows, steps) in [0, 1).
            temperature: above 0.
        """
        uniforms = uniforms.float().contiguous()
        tokens, logprobs = (torch.empty(uniforms.shape, dtype=kind) for kind in (torch.long, torch.float32))
        held = logits, uniforms, tokens, logprobs
        sizes = logits.stride(0), logits.shape[1], uniforms.shape[1], logits.dtype == torch.bfloat16
        made = cls(*(x.data_ptr() for x in held), *sizes, 1.0 / temperature)
        made.held = held  # their memory is read as long as this lives
        return made, tokens, logprobs


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        draws = ctypes.POINTER(Draws)
        found.opd_draw.argtypes, found.opd_draw.restype = [draws, LONG, LONG, INT], None
        found.opd_write.argtypes = [POINTER, POINTER, POINTER, draws, POINTER, POINTER, POINTER, LONG, INT]
        found.opd_write.restype = LONG
    return found


class Writing(ABC):
    """Rows of tokens that are continued one token a step."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """(rows, V) logits of the token behind ``ids`` (rows,), the newest token of every row."""

    def run(self, ids: Tensor, law: Law, uniforms: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities (rows, n) of the next n steps, at least one. Only in the last of them may a row draw a
        token that ends it.

        Args:
            ids: (rows,) the newest token of every row.
            law: that tokens are drawn with.
            uniforms: (rows, most) in [0, 1), a column a step.
            ends: (V,) True for tokens that end a row.
        """
        tokens, logprobs = law.sample(self.step(ids)[:, : len(ends)], uniforms[:, 0])
        return tokens[:, None], logprobs[:, None]


@dataclass(frozen=True)
class Law:
    """How next-token logits become the probabilities that tokens are drawn with.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keeps the smallest set of tokens with at least this mass; 1 keeps all.
        top_k: keeps this many likeliest tokens; 0 keeps all.
        functions: whether a C function may draw from a vocabulary that is not cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    functions: bool = True

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row, and its log-probability under this law.

        Args:
            logits: (rows, V).
            uniform: (rows,) in [0, 1).
        """
        if self.is_drawn_by_function(logits):
            draws, tokens, logprobs = Draws.of(logits, uniform[:, None], self.temperature)
            functions: Any = library()
            functions.opd_draw(draws, 0, len(logits), torch.get_num_threads())
            return tokens[:, 0], logprobs[:, 0]
        at_once = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        drawn, recorded = [], []
        for some, points in zip(logits.split(at_once), uniform.split(at_once), strict=True):
            probabilities = self.probabilities(some)
            tokens = draw(probabilities, points)
            drawn.append(tokens)
            recorded.append(probabilities.gather(-1, tokens[:, None]).squeeze(-1).log())
        return torch.cat(drawn), torch.cat(recorded)

    def is_drawn_by_function(self, logits: Tensor) -> bool:
        """Whether the C function draws from such logits: whole laws of float32 or bfloat16 ones on a CPU."""
        whole = self.temperature > 0.0 and self.top_p == 1.0 and not 0 < self.top_k < logits.shape[1]
        taken = logits.is_cpu and logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(1) == 1
        return self.functions and whole and taken and library() is not None

    def probabilities(self, logits: Tensor) -> Tensor:
        """(rows, V) float32; 0 for every token that is cut off."""
        if self.temperature == 0.0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros(logits.shape, device=logits.device).scatter_(-1, best, 1.0)
        if self.temperature != 1.0:
            logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            worst_kept = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < worst_kept, -torch.inf)
        if self.top_p < 1.0:
            ranked, ids = logits.softmax(-1, dtype=torch.float32).sort(-1, descending=True)
            outside = ranked.cumsum(-1) - ranked >= self.top_p  # the token that crosses the line is kept
            logits = logits.masked_fill(outside.gather(-1, ids.argsort(-1)), -torch.inf)
        return logits.softmax(-1, dtype=torch.float32)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: the first, in vocabulary order, at which the running sum passes the row's share of the whole.

    The sum over a long vocabulary runs over blocks first and inside one block then, so that no running sum of length V is made.
    A token of probability 0 is never drawn.

    Args:
        probabilities: (rows, V), non-negative.
        uniform: (rows,) in [0, 1).

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]] * 3), torch.tensor([0.2, 0.25, 0.9])).tolist()
    [0, 2, 2]
    """
    rows, vocab = probabilities.shape
    if vocab <= SHORT:
        return _passed(probabilities, uniform[:, None] * probabilities.sum(-1, keepdim=True))[0].squeeze(-1)
    missing = -vocab % BLOCK
    if missing:
        probabilities = torch.nn.functional.pad(probabilities, (0, missing))
    blocks = probabilities.view(rows, -1, BLOCK)
    mass = blocks.sum(-1)
    point = uniform[:, None] * mass.sum(-1, keepdim=True)
    block, running = _passed(mass, point)
    rest = point - (running.gather(-1, block) - mass.gather(-1, block))
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1)
    return (block * BLOCK + _passed(inside, rest)[0]).squeeze(-1)


def _passed(mass: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, 1) the first entry at which the running sum passes ``point``, which then has mass, and the running sum."""
    running = mass.cumsum(-1)
    last = torch.nextafter(running[:, -1:], running.new_zeros(()))
    point = torch.minimum(point, last).clamp_(min=0.0)  # rounding may have led past an end
    # without a number among them, rows may end anywhere
    return torch.searchsorted(running, point, right=True).clamp_(max=mass.shape[-1] - 1), running
