"""SIGTERM to the command: a checkpoint, exit code 143, and the same weights after resuming."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from opd_lightning.callbacks.recovery import checkpoints
from tests.test_kill import CONFIG, finish, start, wait_for_training


def test_sigterm_exits_143_and_resumes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "stop.yaml"
    config.write_text(CONFIG.format(steps=60, student=pair[0], teacher=pair[1]))
    process = start(config, tmp_path / "run")
    wait_for_training(process, tmp_path / "run")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) == 143
    assert int(checkpoints(tmp_path / "run/checkpoints")[0].stem.split("-")[1]) < 60
    found = finish(config, tmp_path / "run")
    expected = finish(config, tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_crash_below_python_says_where_python_was(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "crash.yaml"
    config.write_text(CONFIG.format(steps=60, student=pair[0], teacher=pair[1]))
    with (tmp_path / "said").open("w") as said:
        process = start(config, tmp_path / "run", said)
        wait_for_training(process, tmp_path / "run")
        os.kill(process.pid, signal.SIGSEGV)
        assert process.wait(timeout=100) == -signal.SIGSEGV
    told = (tmp_path / "said").read_text()
    assert "Fatal Python error: Segmentation fault" in told and "opd_lightning/cli.py" in told, told[-3000:]
