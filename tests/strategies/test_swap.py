"""One run under one process, DDP, FSDP1 and FSDP2: the same rollouts, losses and weights; a checkpoint of one resumes
under every other, from the middle of a refresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_lightning.callbacks.series import read
from tests.strategies.swap_run import run
from tests.strategies.test_splits import two_processes

STEP_3 = "checkpoints/step-000003.ckpt"  # the second refresh serves steps 2 and 3: this lies between them
SHARED = ("ddp", "fsdp", "fsdp2")


def assert_same(found: dict, expected: dict) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=2e-5, rtol=2e-5)
    for a, b in zip(found["history"], expected["history"], strict=True):
        assert a["completion_tokens"] == pytest.approx(b["completion_tokens"])  # the same completions
        assert a["reverse_kl"] == pytest.approx(b["reverse_kl"], abs=1e-5)


def assert_same_steps(found: dict, expected: dict, first: int) -> None:
    """The same completions, token for token, and the same losses, from a step on."""
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)
    assert found["losses"] == pytest.approx({step: x for step, x in expected["losses"].items() if step >= first}, abs=2e-6)
    assert len(expected["rollouts"]) == 40 and len(found["rollouts"]) == 8 * (5 - first)
    assert all(expected["rollouts"][row] == ids for row, ids in found["rollouts"].items())


def assert_same_series(found: Path, expected: Path) -> None:
    """The map of positions is the mean over all ranks; one process alone writes token records, of rollouts of its own."""
    maps = [read(folder / "positions.jsonl") for folder in (found, expected)]
    assert [line["step"] for line in maps[0]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(*maps, strict=True):
        assert ours["count"] == theirs["count"]
        for name in ("student_entropy", "teacher_entropy", "reverse_kl"):
            assert [x for x in ours[name] if x is not None] == pytest.approx(
                [x for x in theirs[name] if x is not None], rel=2e-3
            )
    lines = [read(folder / "tokens.jsonl") for folder in (found, expected)]
    rows = [[(line["step"], line["row"]) for line in some] for some in lines]
    assert len(set(rows[0])) == len(rows[0]) == len(rows[1]) == 15


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_same_run_under_every_strategy_and_across_them(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = run(tmp_path / "one", pair, "auto", devices=1, micro=4, kind=kind)
    straight = [f"{strategy}:{strategy}:{kind}" for strategy in SHARED]
    crossing = [
        f"{origin}-{target}:{target}:{kind}:{tmp_path / origin / STEP_3}" for origin in ("one", *SHARED) for target in SHARED
    ]
    two_processes("tests/strategies/swap_run.py", tmp_path, *pair, *straight, *crossing)
    for case in (*straight, *crossing):
        found = torch.load(tmp_path / f"{case.partition(':')[0]}.pt", weights_only=True)
        assert_same(found, alone)
        assert_same_steps(found, alone, first=0 if case in straight else 3)
    for origin in SHARED:
        assert_same_series(tmp_path / origin, tmp_path / "one")
    for origin in SHARED:
        back = run(tmp_path / "back", pair, "auto", 1, 4, kind=kind, resume=str(tmp_path / origin / STEP_3))
        assert_same(back, alone)
        assert_same_steps(back, alone, first=3)
        inside = torch.load(tmp_path / origin / STEP_3, weights_only=True)
        assert not any("teacher" in key for key in inside["state_dict"])
        if kind == "lora":
            assert all("lora_" in key for key in inside["state_dict"])


@pytest.mark.slow
def test_checkpointed_activations_change_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    kind = "lora+checkpointing"
    alone = run(tmp_path / "one", pair, "auto", devices=1, micro=4, kind="lora")
    two_processes("tests/strategies/swap_run.py", tmp_path, *pair, *(f"{s}:{s}:{kind}" for s in SHARED))
    for strategy in SHARED:
        found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        assert_same(found, alone)
        assert_same_steps(found, alone, first=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategies"), [("lora+bfloat16", ("ddp", "fsdp2")), ("full+bfloat16", SHARED)])
def test_bfloat16_weights(kind: str, strategies: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The first refresh is the same; then roundings add up in another order and completions part."""
    alone = run(tmp_path / "one", pair, "auto", devices=1, micro=4, kind=kind)
    two_processes("tests/strategies/swap_run.py", tmp_path, *pair, *(f"{s}:{s}:{kind}" for s in strategies))
    for strategy in strategies:
        found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        assert {w.dtype for w in found["weights"].values()} == {w.dtype for w in alone["weights"].values()}
        assert all(found["rollouts"][row] == alone["rollouts"][row] for row in range(16))
        assert [found["losses"][i] for i in (0, 1)] == pytest.approx([alone["losses"][i] for i in (0, 1)], rel=0.03)
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name].float(), tensor.float(), atol=0.05, rtol=0.05)
