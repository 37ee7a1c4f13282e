"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OTHER = "other"


class Clock:
    """Adds up seconds by phase. Phases nest: while an inner one runs, the outer one stands still.

    On a GPU, whose work is only queued by the calls that ask for it, every change of phase waits for the device; so
    phases are measured there while `exact` is True, and the whole alone otherwise.

    >>> clock = Clock()
    >>> with clock.phase("rollout"):
    ...     pass
    >>> sorted(clock.seconds)
    ['other', 'rollout']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {OTHER: 0.0}
        self.exact = True
        self._stack = [(OTHER, False)]
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str, whole: bool = False) -> Iterator[None]:
        """Count what runs inside as ``name``; a ``whole`` phase also counts what inner phases would."""
        self.enter(name, whole)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str, whole: bool = False) -> None:
        """Begin a phase; for hooks, which come in pairs. `leave` ends it."""
        self._charge()
        outer, closed = self._stack[-1]
        self._stack.append((outer, True) if closed else (name, whole))

    def leave(self) -> None:
        """End the innermost phase."""
        self._charge()
        if len(self._stack) > 1:
            self._stack.pop()

    @property
    def current(self) -> str:
        """The phase that runs now."""
        return self._stack[-1][0]

    def restart(self) -> None:
        """Forget everything; the time counts from here."""
        self.seconds, self._stack, self._since = {OTHER: 0.0}, [(OTHER, False)], time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds by phase so far."""
        self._charge()
        return dict(self.seconds)

    def _charge(self) -> None:
        if self.exact and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        name, _ = self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
