"""Faults of one rank of two: nobody waits for ever, nothing is left running, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks.recovery import checkpoints
from tests.faults.parts import FAULT
from tests.faults.test_faults import Place, sound
from tests.strategies.test_splits import ROOT

__all__ = ["sound"]
STILL = ("--model.student.lora.dropout", "0", "--trainer.callbacks+=Watchdog", "--trainer.callbacks.seconds=20")


def fit(place: Place, strategy: str) -> tuple[int, str]:
    """Exit code and all that is said by a run on two processes; one that hangs, or leaves a process behind, fails."""
    command = [sys.executable, "-m", "opd_lightning", "fit", "-c", str(place.root / "run.yaml"), "--ckpt_path", "last", *STILL]
    command += ["--trainer.strategy", strategy, "--trainer.devices", "2"]
    keys = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", FAULT: str(place.root / "fault")}
    log = place.root / "said"
    with log.open("w") as file:
        run = subprocess.Popen(command, env={**os.environ, **keys}, stdout=file, stderr=file, start_new_session=True)
        try:
            code = run.wait(timeout=100)
        finally:
            left = _end(run.pid)
    assert not left, "a process was left running"
    return code, log.read_text()


def _end(group: int) -> bool:
    """Whether a process of a group lives on for ten seconds; it is ended then."""
    for _ in range(100):
        states = [stat for file in Path("/proc").glob("[0-9]*/stat") if (stat := _stat(file))[2:3] == [str(group)]]
        if all(state[0] == "Z" for state in states):
            return False
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return True


def _stat(file: Path) -> list[str]:
    """State, parent, group, ... of a process; empty if it is gone."""
    try:
        return file.read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def expected(sound: Any) -> dict[str, torch.Tensor]:
    place = sound.copy(sound.root.with_name("without_dropout"))
    assert place.fit(*STILL[:2])[0] == 0
    return place.weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "strategy", "code", "says"),
    [
        ("rank", "ddp", 1, "its last checkpoint is"),
        ("full disk", "fsdp2", 0, "checkpoint of step 4 could not be written ([Errno 27] File too large)"),
        ("loss", "ddp", 1, "loss is not finite at optimizer step 3 on 1 of 2 ranks"),
    ],
)
def test_one_of_two_ranks(
    fault: str, strategy: str, code: int, says: str, sound: Any, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    place = sound.copy(tmp_path / "place")
    place.order(fault, 3)
    ended, said = fit(place, strategy)
    assert says in said, said[-3000:]
    if fault != "full disk":  # its last words may not fit on the disk either
        assert ended == code, said[-3000:]
    assert checkpoints(place.run / "checkpoints")[0].name == "step-000002.ckpt"
    ended, said = fit(place, strategy)
    assert ended == 0, said[-3000:]
    close(place.weights(), expected)
