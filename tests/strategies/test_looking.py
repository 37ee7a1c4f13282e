"""Images on two processes: what one does, also where a rank's micro-batch, or a whole step, has nothing to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import looking
from tests.strategies.looking_run import run
from tests.strategies.test_splits import two_processes

SHARED = ("ddp", "fsdp", "fsdp2")
STEP_1 = "checkpoints/step-000001.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen", "llava+lora"])
def test_two_processes_do_what_one_does(kind: str, tmp_path: Path) -> None:
    build = looking.qwen if "qwen" in kind else looking.llava
    pair = build(tmp_path / "student", 0), build(tmp_path / "teacher", 1)
    alone = run(tmp_path / "one", pair, "auto", 1, kind)
    two_processes("tests/strategies/looking_run.py", tmp_path, *pair, kind, *SHARED)
    start = torch.load(tmp_path / "one" / STEP_1, weights_only=True)["state_dict"]
    eyes = [n for n in alone["weights"] if "vision_tower" in n or "visual" in n]
    assert any(not torch.equal(alone["weights"][n], start[f"student.{n}"]) for n in eyes)
    for strategy in SHARED:
        found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        assert found["seen"][:4] == [["ii", "tt"], ["ii", "tt"], ["tt", "tt"], ["tt", "tt"]]
        assert {"ti", "it"} & {mark for marks in found["seen"][4:] for mark in marks}
        assert found["rollouts"] == alone["rollouts"] and len(found["rollouts"]) == 24
        assert found["losses"] == pytest.approx(alone["losses"], abs=2e-6)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, atol=2e-5, rtol=2e-5)
        back = run(tmp_path / "back" / strategy, pair, "auto", 1, kind, str(tmp_path / strategy / STEP_1))
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(back["weights"][name], tensor, atol=2e-5, rtol=2e-5)
