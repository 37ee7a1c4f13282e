"""Rollouts written one refresh ahead: whose they are, the same however long the thread takes, and resumed to the bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from opd_lightning.callbacks import OPDCheckpoint, RolloutRefresh
from opd_lightning.models import LoRA
from opd_lightning.objectives import NoCorrection, Objective, ReverseKL, SampledToken
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold
from opd_lightning.types import Completion
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

STEPS = 6


class Slow(NativeSampler):
    """Takes longer than the steps that are trained meanwhile."""

    def write(self, *args: Any) -> list[Completion]:
        time.sleep(0.05)
        return super().write(*args)


class Ages(pl.Callback):
    """Step -> steps of the students that wrote its rollouts; row -> tokens."""

    def __init__(self) -> None:
        self.found: dict[int, set[int]] = {}
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.found[trainer.global_step] = set(batch.policy_step.flatten().tolist())
        self.rows |= {int(r): t[m].tolist() for r, t, m in zip(batch.row, batch.text.targets, batch.mask, strict=True)}


def fit(root: Path, pair: tuple[Path, Path], sampler: NativeSampler, ahead: str | None, resume: Path | None = None) -> Any:
    pl.seed_everything(11, verbose=False)
    module, ages = tiny_module(pair, lora=LoRA(r=4, dropout=0.2)), Ages()
    rollout = RolloutRefresh(sampler=sampler, every_n_steps=2, seed=5, ahead=ahead)
    trainer = tiny_trainer(root, [rollout, ages, OPDCheckpoint(every_n_steps=1, keep=0)], max_steps=STEPS)
    trainer.fit(module, tiny_data(), ckpt_path=resume)
    return weights(module), ages


def test_written_by_the_student_of_the_refresh_before(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sampler = NativeSampler(max_new_tokens=6)
    found, ages = fit(tmp_path / "ahead", pair, sampler, "same")
    assert ages.found == {0: {0}, 1: {0}, 2: {0}, 3: {0}, 4: {2}, 5: {2}}
    module = tiny_module(pair, lora=LoRA(r=4, dropout=0.2))  # as it was in the beginning
    module.configure_model()
    module.eval()
    data = tiny_data()
    data.vocabulary = module.vocabulary
    data.setup("fit")
    refresh = RolloutRefresh(sampler=sampler, seed=5)
    prompts = [data.prompt_at(row) for row in range(16, 32)]  # of steps 2 and 3
    seeds = [fold(refresh.seed, "rollout", row) for row in range(16, 32)]
    written = sampler.write(module.student, [p.ids for p in prompts], seeds, module.vocabulary, 0)
    assert [list(c.ids) for c in written] == [ages.rows[row] for row in range(16, 32)]
    later, _ = fit(tmp_path / "slow", pair, Slow(max_new_tokens=6), "same")
    assert same(later, found)
    fresh, _ = fit(tmp_path / "fresh", pair, sampler, None)
    assert not same(fresh, found)
    for step in range(1, STEPS):
        resumed, _ = fit(tmp_path / "again", pair, sampler, "same", tmp_path / f"ahead/checkpoints/step-{step:06d}.ckpt")
        assert same(resumed, found), step


def test_refused_without_a_correction(pair: tuple[Path, Path], tmp_path: Path) -> None:
    objective = Objective(ReverseKL(), SampledToken(), correction=NoCorrection())
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=4), seed=5, ahead="same")
    with pytest.raises(ValueError, match=r"NoCorrection takes every token for the student's own.*serves 2 optimizer steps"):
        tiny_trainer(tmp_path, [rollout]).fit(tiny_module(pair, objective), tiny_data())
