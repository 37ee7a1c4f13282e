"""A run of ``opd fit`` that another command starts, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import sys

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ERROR_LINE = re.compile(r"(\[rank\d+\]: |opd: )?[\w.]*(Error|Exception|Objective|Interrupt|Exit): |opd: ")


def command(words: list[str]) -> list[str]:
    """``opd fit`` with these words, by the same interpreter."""
    return [sys.executable, "-m", "opd_lightning", "fit", *words]


def environment() -> dict[str, str]:
    """This process's environment without its place among ranks: the run has ranks of its own."""
    return {k: v for k, v in os.environ.items() if k not in RANKS}


def last_error(text: str, code: int) -> str:
    """The line of a log that says why a run failed."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if ERROR_LINE.match(line)]
    return (found or lines or [f"exit code {code}"])[-1].removeprefix("opd: ")
