"""How a worker process talks with the script that times it. Standard library only: peers import it in their own environment.

Orders come as JSON lines on the standard input, answers go as lines that begin with ``@@`` to the standard output; everything
else that a library prints there is ignored. A worker that waits for its next order blocks in a read and uses no processor.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "@@"


def answer(**fields: Any) -> None:
    """Send one answer."""
    print(MARK + json.dumps(fields), flush=True)


def orders() -> Iterator[dict[str, Any]]:
    """Orders as they come; ends when the other side closes the pipe."""
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def rss() -> int:
    """Resident memory of this process now, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that are there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Clock:
    """Seconds per phase of a step; a phase inside another one is taken out of the outer one.

    Args:
        wait: called at every border, so that work handed to an accelerator is counted where it was started.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._border = self._start = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.wait()
        self.seconds = {}
        self._start = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """End it: ``seconds`` of the whole step and ``phases``, with what lies outside all of them as ``other``."""
        self.wait()
        total = time.perf_counter() - self._start
        other = total - sum(self.seconds.values())
        return {"seconds": total, "phases": {**self.seconds, "other": other}}

    def _account(self) -> None:
        self.wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._border
        self._border = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    def wrap(self, owner: Any, attribute: str, name: str, unless: tuple[str, ...] = ()) -> None:
        """Count every call of a function of ``owner`` as ``name``, but not where it is called inside a phase of ``unless``."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._open[-1] in unless:
                return original(*args, **kwargs)
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)
