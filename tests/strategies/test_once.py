"""Under FSDP2 the first process reads the weights for all: the same weights, buffers and losses, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.models.tiny import save_tiny
from tests.strategies.test_splits import two_processes

KINDS = ("lora+ema+pruned", "full+bfloat16+checkpointing", "lora+needy")


def equal(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.slow  # test_swap.py and test_teachers.py run the same way of building in the default suite
def test_one_process_reads_what_every_process_would_have(pair: tuple[Path, Path], tmp_path: Path) -> None:
    said = two_processes(
        "tests/strategies/once_run.py", tmp_path, *pair, *(f"{kind}:{way}" for kind in KINDS for way in ("once", "each"))
    )
    for kind in KINDS:
        once, each = (torch.load(tmp_path / f"{kind}:{way}.pt", weights_only=True) for way in ("once", "each"))
        for part in ("begun", "ended", "rollouts", "losses"):
            assert once[part].keys() == each[part].keys()
            assert not [key for key, value in each[part].items() if not equal(once[part][key], value)], (kind, part)
        assert any(name.endswith("inv_freq@1") for name in once["begun"])
    assert said.count("every process reads all weights of Needy") == 1


@pytest.mark.slow
def test_the_second_process_never_holds_a_whole_copy(tmp_path: Path) -> None:
    """Two networks of 155 MB: each process keeps half of each, 155 MB; a whole copy of both takes 310 MB."""
    sizes: dict[str, int] = {"hidden": 512, "layers": 12, "heads": 8}
    pair = save_tiny(tmp_path / "student", **sizes, seed=1), save_tiny(tmp_path / "teacher", **sizes, seed=2)
    peaks = {}
    for way in ("once", "each"):  # processes of their own: a peak is never taken back
        two_processes("tests/strategies/once_run.py", tmp_path, *pair, f"memory:{way}")
        peaks[way] = torch.load(tmp_path / f"memory:{way}.pt", weights_only=True)
    print(f"\npeak MB of ranks 0 and 1 before training: {peaks}")
    assert peaks["once"][1] < peaks["each"][1] - 120.0
