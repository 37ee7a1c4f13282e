"""A run of ``opd fit`` that another command starts, in a process of its own."""

from __future__ import annotations

import os
import sys

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(words: list[str]) -> list[str]:
    """``opd fit`` with these words, by the same interpreter."""
    return [sys.executable, "-m", "opd_lightning", "fit", *words]


def environment() -> dict[str, str]:
    """This process's environment without its place among ranks: the run has ranks of its own."""
    return {k: v for k, v in os.environ.items() if k not in RANKS}
