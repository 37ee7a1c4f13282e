"""Watchdog: who waits for whom, when a run on several processes stands still."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel

LIBRARIES = tuple(str(Path(package.__file__).parent) for package in (torch, pl) if package.__file__)
"""Where a frame is not what a person looks for."""
GLANCES = 8
"""How often the main thread is looked at before it counts as standing still."""
FAREWELL = 10.0
"""Seconds that the end of a run waits for a last answer of the store."""


class Watchdog(pl.Callback):
    """Says where every rank is when one of them has sat in a single call for too long, most often in a collective that
    another rank does not join. It changes nothing: ending the run is left to the time-out of the process group (half an hour,
    ten minutes with NCCL; ``timeout`` of the strategy), which does not say who was missing.

    A rank that prints no line is dead or stopped. With one process nothing is watched.

    Args:
        seconds: how long a rank may sit in one call; 0 watches nothing.

    Raises:
        ValueError: for a negative number.
    """

    def __init__(self, seconds: float = 120.0) -> None:
        if seconds < 0:
            raise ValueError(f"Watchdog(seconds={seconds}): must be at least 0, and 0 watches nothing")
        self.seconds = seconds
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if not self.seconds or parallel.world_size() == 1:
            return
        self._end()  # of an earlier fit
        self._over = threading.Event()
        watched = threading.main_thread().ident
        bell = parallel.shared_counter("opd_watchdog")
        arguments = (trainer, pl_module, watched, bell, self._over)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="opd watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        """Wait until the thread is gone: one that asks the store while the interpreter ends would abort the process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(FAREWELL)
            self._thread = None

    def _watch(self, trainer: Any, pl_module: Any, watched: int, bell: Any, over: threading.Event) -> None:
        """Look at the main thread until it is over; ring where it stands still, and answer when any rank rings."""
        place, since, rung, heard = None, time.monotonic(), False, bell(0)
        while not over.wait(self.seconds / GLANCES):
            frames = list(_stack(sys._current_frames().get(watched)))
            here = [(id(frame), frame.f_lasti) for frame in frames]
            now = time.monotonic()
            if here != place:
                place, since, rung = here, now, False
            try:
                if not rung and now - since >= self.seconds:
                    rung = True
                    bell(1)
                total = bell(0)
            except Exception as error:  # whatever a store raises when its process is gone
                _say(trainer, pl_module, frames, now - since, f"; the first rank does not answer ({type(error).__name__})")
                return
            if total != heard:
                heard = total
                _say(trainer, pl_module, frames, now - since)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames of a thread, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _say(trainer: Any, pl_module: Any, frames: list[FrameType], seconds: float, more: str = "") -> None:
    own = next((f for f in frames if not f.f_code.co_filename.startswith((*LIBRARIES, "<"))), None)
    joined = next((f.f_code.co_name for f in frames if "distributed" in f.f_code.co_filename.split("/")), None)
    where = f"{Path(own.f_code.co_filename).name}:{own.f_lineno} ({own.f_code.co_name})" if own is not None else "nowhere"
    waiting = f"waits in {joined} for" if joined is not None and not more else "has been there for"
    line = (
        f"watchdog: rank {trainer.global_rank} of {trainer.world_size}: optimizer step {trainer.global_step}, phase "
        f"`{pl_module.clock.current}`, at {where}; {waiting} {seconds:.0f} s{more}\n"
    )
    sys.stderr.write(line)  # in one piece, its end included: the ranks speak at the same moment, to the same pipe
    sys.stderr.flush()
