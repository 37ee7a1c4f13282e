"""Moving teachers follow optimizer steps, not micro-batches, and resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.data import PlainTemplate
from opd_lightning.models import (
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    FunctionTeacher,
    LiveTeacher,
    LoRA,
    PeriodicTeacher,
    RoutedTeacher,
    Teacher,
    TrustRegionTeacher,
)
from opd_lightning.module import OPDModule
from opd_lightning.samplers import NativeSampler
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights
from tests.models.test_teachers import uniform

STEPS = 6


def build(root: Path, pair: tuple[Path, Path], teacher: Teacher, lora: bool, micro: int = 4) -> tuple[Any, Any, Any]:
    """The teacher sees one character more; two micro-batches make a step."""
    pl.seed_everything(11, verbose=False)
    module = tiny_module(pair, lora=LoRA(r=4, dropout=0.2) if lora else None, teacher=teacher)
    callbacks = [
        RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), rollouts_per_prompt=2, every_n_steps=2, seed=5),
        CompletionEval(every_n_steps=3, sampler=NativeSampler(max_new_tokens=6), seed=5),
        OPDCheckpoint(every_n_steps=1, keep=0),
    ]
    data = tiny_data(micro_batch_size=micro, template=PlainTemplate(), teacher_template=PlainTemplate(prefix="7"))
    return module, data, tiny_trainer(root, callbacks, max_steps=STEPS)


def state_of(module: OPDModule) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = module.teacher.state_dict()["weights"]
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("make", [lambda: EMATeacher(0.2), lambda: EMATeacher(0.5, every=2), lambda: PeriodicTeacher(4)])
def test_moving_teachers_resume_bit_for_bit(make: Any, lora: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path / "whole", pair, make(), lora)
    trainer.fit(module, data)
    history = next(c for c in trainer.callbacks if isinstance(c, CompletionEval)).history
    for step in range(1, STEPS):
        again, more, resumed = build(tmp_path / "again", pair, make(), lora)
        file = tmp_path / f"whole/checkpoints/step-{step:06d}.ckpt"
        resumed.fit(again, more, ckpt_path=str(file))
        assert same(weights(again), weights(module)), step
        assert same(state_of(again), state_of(module)), step
        assert next(c for c in resumed.callbacks if isinstance(c, CompletionEval)).history == history
    state = torch.load(file, weights_only=True)
    assert set(state["teachers"]["teacher"]["weights"]) == set(weights(module))  # a LoRA student's base is not in it
    assert not any("teacher" in key for key in state["state_dict"])


def test_a_teacher_follows_optimizer_steps_whatever_the_micro_batches(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The average recomputed from the checkpoints' student weights."""
    for micro in (8, 2):
        module, data, trainer = build(tmp_path / str(micro), pair, EMATeacher(0.2), lora=True, micro=micro)
        module.configure_model()
        expected = {n: w.double() for n, w in weights(module).items()}
        trainer.fit(module, data)
        for step in range(1, STEPS + 1):
            state = torch.load(tmp_path / f"{micro}/checkpoints/step-{step:06d}.ckpt", weights_only=True)
            now = {n: state["state_dict"][f"student.{n}"].double() for n in expected}
            expected = {n: 0.8 * w + 0.2 * now[n] for n, w in expected.items()}
            for name, average in state["teachers"]["teacher"]["weights"].items():
                torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_the_teacher_of_a_run_comes_back_without_a_trainer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path, pair, EMATeacher(0.2), lora=True)
    trainer.fit(module, data)
    loaded = OPDModule.load_from_checkpoint(tmp_path / "checkpoints/step-000006.ckpt")
    assert same(state_of(loaded), state_of(module))


def test_a_checkpoint_of_a_run_with_a_frozen_teacher_names_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path, pair, FrozenTeacher(str(pair[1])), lora=True)
    trainer.fit(module, data)
    assert torch.load(tmp_path / "checkpoints/step-000002.ckpt", weights_only=True)["teachers"] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda pair: LiveTeacher(),
        lambda pair: TrustRegionTeacher(0.2, max_kl=0.01),
        lambda pair: FunctionTeacher(uniform),
        lambda pair: EnsembleTeacher([FrozenTeacher(str(pair[1])), EMATeacher()], mean="geometric"),
        lambda pair: RoutedTeacher({"sums": FrozenTeacher(str(pair[1])), "rest": EMATeacher()}, default="rest"),
    ],
    ids=["live", "trust-region", "function", "ensemble", "routed"],
)
def test_every_teacher_trains_evaluates_and_resumes(make: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for resume in (None, str(tmp_path / "0/checkpoints/step-000003.ckpt")):
        module, data, trainer = build(tmp_path / str(len(found)), pair, make(pair), lora=True)
        trainer.fit(module, data, ckpt_path=resume)
        found.append((weights(module), next(c for c in trainer.callbacks if isinstance(c, CompletionEval)).history))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    measured = {row["who"] for row in found[0][1]}
    assert measured == ({"student", "teacher"} if make(pair).writes else {"student"})
