"""Resuming is exact: from every checkpoint of a run, in every part of it, with everything that has state."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import ColdStart, CompletionEval, EntropyMonitor, OPDCheckpoint, RolloutRefresh
from opd_lightning.data import ByDifficulty
from opd_lightning.models import LoRA
from opd_lightning.samplers import NativeSampler
from opd_lightning.schedulers import WarmupDecay
from opd_lightning.sources import MixtureSource, StudentSource, TeacherSource
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

STEPS = 8


def build(root: Path, pair: tuple[Path, Path], every: int = 1, steps: int = STEPS, **trainer: Any) -> tuple[Any, Any, Any]:
    """Dropout, a cold start that resets the optimizer, two passes over a mixture, a schedule, a probe, evaluation."""
    pl.seed_everything(11, verbose=False)
    module = tiny_module(
        pair,
        lora=LoRA(r=4, dropout=0.2),
        scheduler=partial(WarmupDecay, warmup_steps=2, total_steps=8, shape="linear"),
    )
    rollout = RolloutRefresh(
        MixtureSource(StudentSource(), TeacherSource(), fraction=0.75),
        NativeSampler(max_new_tokens=6),
        rollouts_per_prompt=2,
        every_n_steps=2,
        passes=2,
        seed=5,
    )
    callbacks = [
        ColdStart(steps=4, reset_optimizer=True),
        rollout,
        CompletionEval(every_n_steps=3, sampler=NativeSampler(max_new_tokens=6), seed=5),
        EntropyMonitor(edges=[2]),
        OPDCheckpoint(every_n_steps=every, keep=0),
    ]
    data = tiny_data(micro_batch_size=4, selector=ByDifficulty(samples=2))
    return module, data, tiny_trainer(root, callbacks, max_steps=steps, **trainer)


@pytest.fixture(scope="module")
def finished(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list]:
    root = tmp_path_factory.mktemp("whole")
    module, data, trainer = build(root, pair)
    trainer.fit(module, data)
    history = next(c for c in trainer.callbacks if isinstance(c, CompletionEval)).history
    return root, weights(module), history


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_from_every_checkpoint_bit_for_bit(
    step: int, finished: tuple[Path, dict, list], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Steps 1 to 4 lie in the cold start, 4 on its border; 1, 3, 5, 7 in the middle of a refresh."""
    root, expected, history = finished
    module, data, trainer = build(tmp_path, pair)
    trainer.fit(module, data, ckpt_path=str(root / f"checkpoints/step-{step:06d}.ckpt"))
    assert trainer.global_step == STEPS
    assert same(weights(module), expected)
    again = next(c for c in trainer.callbacks if isinstance(c, CompletionEval)).history
    assert again == history
    counted = next(c for c in trainer.callbacks if isinstance(c, RolloutRefresh)).total_tokens
    uninterrupted = torch.load(root / f"checkpoints/step-{STEPS:06d}.ckpt", weights_only=True)
    assert counted == uninterrupted["callbacks"]["RolloutRefresh"]["total_tokens"] > 0


def test_measurements_of_a_refresh_are_logged_after_resuming_inside_it(
    finished: tuple[Path, dict, list], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    root, _, _ = finished
    logged = []
    for step in (6, 7):  # on the border of the last refresh, and in its middle
        module, data, trainer = build(tmp_path / str(step), pair)
        trainer.fit(module, data, ckpt_path=str(root / f"checkpoints/step-{step:06d}.ckpt"))
        found = trainer.callback_metrics
        logged.append({k: float(v) for k, v in found.items() if k.startswith("rollout/") and "second" not in k})
    assert logged[0] == logged[1] and logged[0]["rollout/completion_tokens"] > 0


def test_extending_a_finished_run_equals_one_long_run(
    finished: tuple[Path, dict, list], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    root, _, _ = finished
    module, data, trainer = build(tmp_path / "long", pair, steps=10)
    trainer.fit(module, data)
    longer, more, extending = build(tmp_path / "more", pair, steps=10)
    extending.fit(longer, more, ckpt_path=str(root / f"checkpoints/step-{STEPS:06d}.ckpt"))
    assert same(weights(longer), weights(module))


def test_checkpoints_are_plain_small_and_hold_no_teacher(finished: tuple[Path, dict, list]) -> None:
    root, expected, _ = finished
    state = torch.load(root / "checkpoints/step-000003.ckpt", weights_only=True)  # opens without any class of ours
    assert set(state["state_dict"]) == {f"student.{n}" for n in expected}
    assert all("lora_" in name for name in state["state_dict"])
    assert "teacher" not in str(list(state["state_dict"]))


def test_evaluating_does_not_change_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def run(every: int) -> dict[str, torch.Tensor]:
        pl.seed_everything(11, verbose=False)
        module = tiny_module(pair, lora=LoRA(r=4, dropout=0.2))
        evaluation = CompletionEval(every_n_steps=every, sampler=NativeSampler(max_new_tokens=6), seed=5)
        held_out = 8 if every else 0
        rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), seed=5)
        trainer = tiny_trainer(tmp_path, [rollout, evaluation], enable_checkpointing=False)
        data = tiny_data(held_out=held_out)
        data.setup = lambda stage, inner=data.setup: (inner(stage), data.train_prompts.__delitem__(slice(32, None)))[0]
        trainer.fit(module, data)
        return weights(module)

    assert same(run(1), run(0))


def test_a_checkpoint_of_another_student_is_refused(
    finished: tuple[Path, dict, list], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    root, _, _ = finished
    trainer = tiny_trainer(tmp_path, max_steps=STEPS)
    with pytest.raises(ValueError, match="another student"):
        trainer.fit(tiny_module(pair), tiny_data(), ckpt_path=str(root / "checkpoints/step-000003.ckpt"))
