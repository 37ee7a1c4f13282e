"""``opd serve-teacher`` killed under a run: the run waits, says so, and resumes to the weights of the uninterrupted one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opd_lightning.callbacks.recovery import checkpoints

STEPS = 120
CONFIG = """
seed_everything: 4
trainer:
  max_steps: {steps}
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{{class_path: OPDCheckpoint, init_args: {{every_n_steps: 20}}}}]
model:
  student: {{path: {student}}}
  teacher:
    class_path: ServerTeacher
    init_args: {{url: "{url}", k: 6, retries: 0, cache: "", patience: {patience}}}
  objective:
    class_path: Objective
    init_args: {{divergence: ReverseKL, support: {{class_path: TopK, init_args: {{k: 6, by: teacher}}}}}}
data:
  prompts: {{class_path: TaskPrompts, init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 60}}}}
  held_out: 8
  batch_size: 4
rollout: {{sampler: {{max_new_tokens: 8}}}}
eval: {{every_n_steps: 0, sampler: {{max_new_tokens: 8}}}}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def serve(teacher: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "opd_lightning", "serve-teacher", str(teacher), "--name", "tiny", "--port", str(port)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"serving tiny at (http://\S+): top 64", line)
    assert found, line
    return process, found[1]


def fit(config: Path, root: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "opd_lightning", "fit", "-c", str(config), "--trainer.default_root_dir", str(root)]
    words += ["--ckpt_path", "last"]
    return subprocess.Popen(
        words, env=ENVIRONMENT, cwd=root.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def final(root: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(root / "checkpoints")[0]
    assert last.name == f"step-{STEPS:06d}.ckpt"
    return torch.load(last, weights_only=True)["state_dict"]


def until_it_trains(run: subprocess.Popen[str], root: Path) -> None:
    while not checkpoints(root / "checkpoints"):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_servers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    server, url = serve(pair[1])
    config = tmp_path / "server.yaml"

    def configure(patience: float) -> None:
        config.write_text(CONFIG.format(steps=STEPS, student=pair[0], url=url, patience=patience))

    def kill() -> None:
        server.send_signal(signal.SIGKILL)
        server.wait()

    try:
        configure(0.5)
        whole = fit(config, tmp_path / "whole")
        assert whole.communicate(timeout=100)[1] is None and whole.returncode == 0
        expected, port = final(tmp_path / "whole"), int(url.rpartition(":")[2])

        away = fit(config, tmp_path / "away")  # it does not come back: a clean end, and --ckpt_path last goes on
        until_it_trains(away, tmp_path / "away")
        kill()
        said = away.communicate(timeout=60)[0]
        assert away.returncode == 75, said
        assert "is saved. The run waits for it" in said and "go on with --ckpt_path last" in said and "Traceback" not in said
        server, _ = serve(pair[1], port)
        assert fit(config, tmp_path / "away").wait(100) == 0

        configure(600.0)
        paused = fit(config, tmp_path / "paused")  # it comes back, and the run goes on by itself
        until_it_trains(paused, tmp_path / "paused")
        kill()
        time.sleep(2.0)
        server, _ = serve(pair[1], port)
        said = paused.communicate(timeout=100)[0]
        assert paused.returncode == 0 and "the teacher server is back after" in said, said

        stopped = fit(config, tmp_path / "stopped")  # SIGTERM while it waits
        until_it_trains(stopped, tmp_path / "stopped")
        kill()
        assert stopped.stdout is not None
        while "The run waits for it" not in stopped.stdout.readline():
            pass
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(60) == 143
        server, _ = serve(pair[1], port)
        assert fit(config, tmp_path / "stopped").wait(100) == 0
    finally:
        server.kill()
    for name in ("away", "paused", "stopped"):
        found = final(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
