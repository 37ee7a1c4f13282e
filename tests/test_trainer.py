"""What OPDTrainer adds to Lightning's Trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from opd_lightning import trainer as trainer_module
from opd_lightning.callbacks.step_monitor import TrainMonitor
from tests.helpers import tiny_data, tiny_module, tiny_trainer, weights


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is printed on rank zero; torch's precision is put back afterwards."""
    before, found = torch.get_float32_matmul_precision(), []
    monkeypatch.setattr(trainer_module, "rank_zero_info", found.append)
    yield found
    torch.set_float32_matmul_precision(before)


def test_the_precision_of_float32_products_is_set_and_measured(tmp_path: Path, lines: list[str]) -> None:
    tiny_trainer(tmp_path)
    assert lines == [] and torch.get_float32_matmul_precision() == "highest"
    errors = {}
    for precision in ("highest", "medium"):
        tiny_trainer(tmp_path, float32_matmul=precision)
        assert torch.get_float32_matmul_precision() == precision
        errors[precision] = float(re.search(r"error of (\S+) here", lines.pop()).group(1))
    assert 0 < errors["highest"] < 1e-6
    assert errors["highest"] / 2 < errors["medium"] < 1e-2  # float32's own, or bfloat16's on a CPU with AMX


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.float32_matmul='low'.*medium"):
        tiny_trainer(tmp_path, float32_matmul="low")


@pytest.mark.parametrize(("algorithm", "measured"), [("norm", True), ("norm", False), ("value", True)])
def test_a_fused_optimizer_clips_under_mixed_precision(
    algorithm: str, measured: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Stock Lightning refuses after the first rollouts. The norm is known from `TrainMonitor`, if there is one."""
    moved = {}
    for clip in (None, 1e-9):
        module = tiny_module(pair)
        module.optimizer = partial(torch.optim.SGD, lr=1.0, fused=True)
        module.configure_model()
        before = weights(module)
        limits = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm}
        trainer = tiny_trainer(tmp_path, precision="bf16-mixed", max_steps=1, **limits)
        trainer.callbacks = [c for c in trainer.callbacks if measured or not isinstance(c, TrainMonitor)]
        trainer.fit(module, tiny_data())
        assert (module.gradient_norm is not None) is measured
        moved[clip] = sum(float((w - before[n]).square().sum()) for n, w in weights(module).items()) ** 0.5
    assert moved[None] > 1e-3 and moved[1e-9] < 1e-6


def test_generating_without_any_prompt_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt.*data\.held_out"):
        tiny_trainer(tmp_path).generate(tiny_module(pair), tiny_data(held_out=0))
