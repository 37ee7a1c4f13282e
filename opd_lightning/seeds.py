"""Seeds that depend on what they are for, never on how often a generator was asked before.

A rollout's random numbers are a function of (run seed, purpose, rollout number). A resumed run therefore repeats itself, and
one process or eight write the same completions.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor


def fold(*parts: object) -> int:
    """A stable 63-bit seed. Python's own `hash` is salted per process and cannot be used.

    >>> fold(0, "rollout", 7) == fold(0, "rollout", 7) != fold(0, "rollout", 8)
    True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def run_seed(given: int | None) -> int:
    """``given``, or the seed of ``seed_everything``, or 0."""
    return given if given is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))


def uniforms(seeds: list[int], count: int) -> Tensor:
    """(len(seeds), count) uniform numbers in [0, 1), one stream a seed."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float32) for s in seeds]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float32)
