"""Losses and gradients do not depend on how a batch is cut into micro-batches, accumulation and ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.strategies.split_run import OBJECTIVES, run

CUT = {("group_mean", 1), ("graded", 1)}
"""Rollouts of a prompt apart from each other: refused."""
ROOT = Path(__file__).resolve().parents[2]
LONG = 16
"""Digits that make prompts long enough for a group to share them (`opd_lightning.models.packing.WORTH_SHARING`)."""


def two_processes(script: str, *arguments: object, timeout: int = 240) -> str:
    """Run a script on two gloo processes and return what it said; a hang is killed and fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stderr[:6000]}\n...\n{done.stderr[-6000:]}"  # the first error is the cause
    return done.stdout + done.stderr


def close(a: dict, b: dict, tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_process_any_micro_batch(objective: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = run(tmp_path, pair, objective, devices=1, micro=0)
    assert len(whole.lengths) > 2  # completions of unequal lengths
    assert max(g.abs().max() for g in whole.gradient.values()) > 1e-4
    assert objective != "graded" or 0.0 < whole.logged["rollout/grade"] < 1.0
    for micro in (1, 2, 4):
        if (objective, micro) in CUT:
            with pytest.raises(ValueError, match=r"rollout\.rollouts_per_prompt.*data\.micro_batch_size=1"):
                run(tmp_path, pair, objective, devices=1, micro=micro)
            continue
        cut = run(tmp_path, pair, objective, devices=1, micro=micro)
        assert cut.loss == pytest.approx(whole.loss, abs=1e-10)
        assert cut.logged == pytest.approx(whole.logged, abs=1e-6)
        close(cut.gradient, whole.gradient)


def test_two_ranks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cases = [f"{objective}:{micro}:2" for objective in OBJECTIVES for micro in (1, 2, 4) if (objective, micro) not in CUT]
    two_processes("tests/strategies/split_run.py", tmp_path, *pair, *cases)
    for case in cases:
        whole = run(tmp_path, pair, case.partition(":")[0], devices=1, micro=0)
        found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(whole.loss, abs=1e-10)
        assert found["logged"] == pytest.approx(whole.logged, abs=1e-6)
        assert {"rollout/distinct", "rollout/repetition", "train/neg_frac", "train/effective_sample"} < found["logged"].keys()
        assert {"train/leak", "train/teacher_reach", "train/student_top_mass"} < found["logged"].keys()
        close(found["gradient"], whole.gradient)


def test_two_ranks_that_share_prompts_give_the_gradient_of_padded_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    padded = run(tmp_path, pair, "token_mean", devices=1, micro=0, packed=False, digits=LONG)
    packed = run(tmp_path, pair, "token_mean", devices=1, micro=0, digits=LONG)
    two_processes("tests/strategies/split_run.py", tmp_path, *pair, f"token_mean:2:{LONG}")
    ranks = torch.load(tmp_path / f"token_mean:2:{LONG}.pt", weights_only=True)
    for loss, gradient in ((packed.loss, packed.gradient), (ranks["loss"], ranks["gradient"])):
        assert loss == pytest.approx(padded.loss, abs=1e-9)
        close(gradient, padded.gradient, 1e-8)  # the norms of transformers' Llama round to float32, here before or after a sum
