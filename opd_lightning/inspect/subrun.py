"""A run of ``opd fit`` that another command starts, in a process of its own, and how such a command is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Ctrl-C leaves with 130 and SIGTERM with 143, through every ``finally`` on the way."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
