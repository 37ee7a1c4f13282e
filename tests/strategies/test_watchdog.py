"""A run that stands still says which rank waits and which one is missing, before the process group gives up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from opd_lightning import parallel
from opd_lightning.callbacks import Watchdog
from opd_lightning.trainer import OPDTrainer
from tests.strategies.test_splits import ROOT

LINE = re.compile(
    r"watchdog: rank (\d) of 2: optimizer step (\d+), phase `([\w ]+)`, at (\S+) \((\w+)\); ([^;\n]*?) for (\d+) s"
)


def lines(pair: tuple[Path, Path], root: Path, *seconds: float) -> tuple[int, dict[str, re.Match[str]], str]:
    command = [sys.executable, str(ROOT / "tests/strategies/watch_run.py"), str(root), *map(str, (*pair, *seconds))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, {match[1]: match for match in LINE.finditer(done.stderr)}, done.stderr


@pytest.mark.slow
def test_the_sleeping_rank_is_named_before_the_time_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, said, everything = lines(pair, tmp_path, 2.0, 26.0, 20.0)
    assert code != 0  # the process group gave up, after 20 seconds
    assert sorted(said) == ["0", "1"], "\n".join(re.findall(".*watchdog.*", everything)) or everything[-3000:]
    waiting, asleep = said["0"], said["1"]
    assert waiting[2] == asleep[2] == "2"  # the third step
    assert "watch_run.py" in asleep[4] and asleep[5] == "fall_asleep" and asleep[3] == "rollout"
    assert "waits in" in waiting[6] and "parallel.py" in waiting[4]  # it has written its own and waits for the other's
    assert 2 <= int(waiting[7]) < 20
    assert everything.index("watchdog: rank") < everything.lower().index("timed out")


def test_a_rank_that_works_is_not_suspected(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, said, everything = lines(pair, tmp_path, 20.0, 1.0, 60.0)
    assert code == 0, everything[-3000:]
    assert not said


def test_its_thread_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may end right behind the run; a thread that were inside the store's call then would abort it."""
    asked = threading.Event()

    def slow(amount: int) -> int:
        asked.set()
        time.sleep(0.3)
        return 0

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "shared_counter", lambda name: slow)
    trainer: Any = None
    for end in (lambda w: w.teardown(trainer, trainer, "fit"), lambda w: w.on_exception(trainer, trainer, KeyboardInterrupt())):
        watchdog = Watchdog(seconds=60.0)
        watchdog.setup(trainer, trainer, "fit")
        assert asked.wait(10.0)
        asked.clear()
        end(watchdog)
        assert not any(thread.name == "opd watchdog" for thread in threading.enumerate())


def test_it_is_there_by_default_and_has_one_key() -> None:
    (own,) = [c for c in OPDTrainer(accelerator="cpu", logger=False).callbacks if isinstance(c, Watchdog)]
    assert own.seconds == 120.0
    with pytest.raises(ValueError, match="at least 0"):
        Watchdog(seconds=-1)
