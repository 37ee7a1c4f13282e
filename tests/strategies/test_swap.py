"""One run under one process, DDP and FSDP2: the same rollouts and weights; a checkpoint of one resumes under the others, from
the middle of a refresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.strategies.swap_run import run
from tests.strategies.test_splits import two_processes

STEP_3 = "checkpoints/step-000003.ckpt"  # the second refresh serves steps 2 and 3: this lies between them


def assert_same(found: dict, expected: dict, last_measurements: int = 99) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=2e-5, rtol=2e-5)
    for a, b in zip(found["history"][-last_measurements:], expected["history"][-last_measurements:], strict=True):
        assert a["completion_tokens"] == pytest.approx(b["completion_tokens"])  # the same completions
        assert a["reverse_kl"] == pytest.approx(b["reverse_kl"], abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_same_run_under_every_strategy_and_across_them(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = run(tmp_path / "one", pair, "auto", devices=1, micro=4, lora=kind == "lora")
    cases = [f"ddp:ddp:{kind}", f"fsdp2:fsdp2:{kind}"]
    cases += [f"one-fsdp2:fsdp2:{kind}:{tmp_path / 'one' / STEP_3}", f"fsdp2-ddp:ddp:{kind}:{tmp_path / 'fsdp2' / STEP_3}"]
    cases += [f"ddp-fsdp2:fsdp2:{kind}:{tmp_path / 'ddp' / STEP_3}"]
    two_processes("tests/strategies/swap_run.py", tmp_path, *pair, *cases)
    for case in cases:
        name = case.partition(":")[0]
        assert_same(torch.load(tmp_path / f"{name}.pt", weights_only=True), alone)
    for origin in ("ddp", "fsdp2"):
        back = run(tmp_path / "back", pair, "auto", 1, 4, lora=kind == "lora", resume=str(tmp_path / origin / STEP_3))
        assert_same(back, alone)
    inside = torch.load(tmp_path / "fsdp2" / STEP_3, weights_only=True)
    assert not any("teacher" in key for key in inside["state_dict"])
    if kind == "lora":
        assert all("lora_" in key for key in inside["state_dict"])
