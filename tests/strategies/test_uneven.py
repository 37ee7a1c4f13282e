"""Ranks that write completions of different lengths neither wait for ever nor drift apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.strategies.test_splits import two_processes

PAIRS = 200


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp", "ddp"])
def test_two_hundred_pairs_of_lengths(strategy: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    two_processes("tests/strategies/uneven_run.py", tmp_path, *pair, strategy, PAIRS)
    found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
    pairs = list(zip(*found["lengths"], strict=True))
    assert len(pairs) == PAIRS
    assert sum(a != b for a, b in pairs) > 0.9 * PAIRS and len(set(pairs)) > PAIRS / 2
    assert max(abs(a - b) for a, b in pairs) > 25  # hardly any against nearly all of the 32
    first, second = found["weights"]
    if strategy == "ddp":  # under FSDP2 the gathered weights are one thing
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(torch.isfinite(t).all()) for t in first.values())
