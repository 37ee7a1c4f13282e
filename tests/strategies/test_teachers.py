"""Moving, mixed and routed teachers under one process, DDP, FSDP1 and FSDP2: the same student and the same teacher, and
a checkpoint of one strategy goes on under another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.strategies.teacher_run import run
from tests.strategies.test_splits import two_processes
from tests.strategies.test_swap import SHARED, assert_same

STEP_3 = "checkpoints/step-000003.ckpt"  # in the middle of the second refresh


def assert_same_run(found: dict, expected: dict) -> None:
    assert_same(found, expected)
    for name, state in expected["teachers"].items():
        assert found["teachers"][name].keys() == state.keys()
        for key, weight in state.get("weights", {}).items():
            torch.testing.assert_close(found["teachers"][name]["weights"][key], weight, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_moving_teacher_under_every_strategy_and_across_them(size: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = run(tmp_path / "one", pair, "auto", 1, "ema", size == "lora")
    assert alone["teachers"]["teacher"]["step"] == 4
    cases = [f"ddp:ddp:ema:{size}", f"fsdp2:fsdp2:ema:{size}", f"there:fsdp2:ema:{size}:{tmp_path / 'one' / STEP_3}"]
    cases += [f"back:ddp:ema:{size}:{tmp_path / 'fsdp2' / STEP_3}"]
    two_processes("tests/strategies/teacher_run.py", tmp_path, *pair, *cases)
    for case in cases:
        assert_same_run(torch.load(tmp_path / f"{case.partition(':')[0]}.pt", weights_only=True), alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "live", "trust", "ensemble", "routed", "siblings"])
def test_other_teachers_under_every_strategy(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    cases = [f"{strategy}:{strategy}:{kind}:lora" for strategy in SHARED]
    two_processes("tests/strategies/teacher_run.py", tmp_path, *pair, *cases)
    alone = run(tmp_path / kind, pair, "auto", 1, kind, lora=True)
    for strategy in SHARED:
        assert_same_run(torch.load(tmp_path / f"{strategy}.pt", weights_only=True), alone)
