"""kill -9 at random moments; every run resumes from its last checkpoint to the weights of the uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import torch

from opd_lightning.callbacks.recovery import checkpoints

STEPS = 60
CONFIG = """
seed_everything: 4
trainer:
  max_steps: {steps}
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{{class_path: OPDCheckpoint, init_args: {{every_n_steps: 3, keep: 2}}}}, EntropyMonitor]
model:
  student: {{path: {student}, lora: {{r: 4, dropout: 0.1}}}}
  teacher: {{class_path: FrozenTeacher, init_args: {{path: {teacher}}}}}
data:
  prompts: {{class_path: TaskPrompts, init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 60}}}}
  held_out: 8
  batch_size: 8
  micro_batch_size: 4
cold_start: {{steps: 20}}
rollout: {{every_n_steps: 2, sampler: {{max_new_tokens: 24}}}}
eval: {{every_n_steps: 7, sampler: {{max_new_tokens: 24}}}}
"""


def start(config: Path, root: Path, said: IO[str] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "opd_lightning", "fit", "-c", str(config), "--trainer.default_root_dir", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONFAULTHANDLER", None)  # of the tests; a user has none
    return subprocess.Popen(
        [*command, "--ckpt_path", "last"],
        env=environment,
        cwd=root.parent,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
    )


def wait_for_training(process: subprocess.Popen[bytes], root: Path) -> None:
    """Until a first checkpoint stands there, or the process has ended."""
    while not checkpoints(root / "checkpoints") and process.poll() is None:
        time.sleep(0.01)


def finish(config: Path, root: Path) -> dict[str, torch.Tensor]:
    assert start(config, root).wait(timeout=200) == 0
    last = checkpoints(root / "checkpoints")[0]
    assert last.name == f"step-{STEPS:06d}.ckpt"
    return torch.load(last, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_ten_kills(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "kill.yaml"
    config.write_text(CONFIG.format(steps=STEPS, student=pair[0], teacher=pair[1]))
    expected = finish(config, tmp_path / "whole")
    moments = random.Random(0)
    killed_at = []
    for number in range(10):
        root = tmp_path / f"run{number}"
        process = start(config, root)
        wait_for_training(process, root)
        time.sleep(moments.uniform(0.0, 3.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed_at.append(int(checkpoints(root / "checkpoints")[0].stem.split("-")[1]))
        found = finish(config, root)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"run {number}, after step {killed_at[-1]}"
    print("killed after the checkpoints of steps", killed_at)
    assert len(set(killed_at)) > 2, f"the kills did not spread: {killed_at}"
