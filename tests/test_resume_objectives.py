"""What objectives carry from step to step (critic, reference, schedules, terms) resumes exactly, however a step is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import OPDCheckpoint, RolloutRefresh
from opd_lightning.models import FrozenTeacher, LoRA
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    GAE,
    BatchMean,
    ForwardKL,
    GroupMean,
    Interpolation,
    NoBaseline,
    Objective,
    ReferenceLaw,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Term,
    Terms,
    WrittenToken,
)
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import MixtureSource, StudentSource, TeacherSource
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

STEPS = 4


def critic() -> Objective:
    return Objective(ReverseKL(), SampledToken(), GAE(0.9, 0.8))


def several() -> Objective:
    terms = [
        Term(Objective(ReverseKL(), SampledToken()), rows="student"),
        Term(Objective(ForwardKL(), WrittenToken()), weight=0.5, final_weight=0.1, rows="others"),
        Term(Objective(ReverseKL(), target=ReferenceLaw()), weight=0.3),
        Term(Objective(ForwardKL(), target=Interpolation(0.2, 1.0)), weight=0.2),
    ]
    return Terms(terms)


def baselines() -> Objective:
    remembering = Objective(ReverseKL(), SampledToken(), ReturnToGo(), BatchMean(0.5))
    return Terms([Term(Objective(ReverseKL(), SampledToken(), baseline=GroupMean())), Term(remembering, weight=0.5)])


def build(root: Path, pair: tuple[Path, Path], make: Any, micro: int = 8, **keys: Any) -> tuple[OPDModule, Any, Any]:
    pl.seed_everything(3, verbose=False)
    module = tiny_module(pair, make(), **keys)
    source = MixtureSource(StudentSource(), TeacherSource(), fraction=0.5) if make is several else StudentSource()
    rollout = RolloutRefresh(source, NativeSampler(max_new_tokens=6), rollouts_per_prompt=1 + (make is baselines), seed=5)
    return module, tiny_data(micro_batch_size=micro), tiny_trainer(root, [rollout, OPDCheckpoint(every_n_steps=1, keep=0)])


def everything(module: OPDModule) -> dict[str, torch.Tensor]:
    head = {} if module.critic is None else {f"critic.{n}": p.detach().clone() for n, p in module.critic.named_parameters()}
    return weights(module) | head


@pytest.mark.parametrize("make", [critic, several, baselines], ids=lambda f: f.__name__)
@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_resumes_bit_for_bit(make: Any, lora: LoRA | None, pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path / "whole", pair, make, lora=lora)
    trainer.fit(module, data)
    expected = everything(module)
    for step in (1, 3):
        again, data, trainer = build(tmp_path / f"from-{step}", pair, make, lora=lora)
        trainer.fit(again, data, ckpt_path=str(tmp_path / f"whole/checkpoints/step-{step:06d}.ckpt"))
        assert trainer.global_step == STEPS
        assert same(everything(again), expected)


@pytest.mark.parametrize("make", [critic, several, baselines], ids=lambda f: f.__name__)
def test_micro_batches_change_nothing(make: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for micro in (8, 2):
        module, data, trainer = build(tmp_path / str(micro), pair, make, micro)
        trainer.fit(module, data)
        found.append(everything(module))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=2e-5)


def test_a_critic_learns_and_is_in_the_checkpoint_but_not_in_the_student(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path, pair, critic)
    trainer.fit(module, data)
    assert module.critic is not None and module.critic.weight.abs().max() > 0
    state = torch.load(tmp_path / f"checkpoints/step-{STEPS:06d}.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["critic.weight"], module.critic.weight)
    module.export(tmp_path / "student")
    FrozenTeacher(str(tmp_path / "student")).build(torch.nn.Identity())


def test_what_a_baseline_remembers_is_in_the_checkpoint_and_used(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The token-weighted mean return of the steps before, older ones halved; without it other weights come out."""
    module, data, trainer = build(tmp_path, pair, baselines)
    trainer.fit(module, data)
    before = torch.load(tmp_path / f"checkpoints/step-{STEPS - 1:06d}.ckpt", weights_only=True)["past_advantages"]
    sums = module.past[0]
    assert before["seen"] == [] and 0 < before["past"][0][1, 1] < sums[1, 1] < 2 * 8 * 6
    assert sums[1, 0] / sums[1, 1] < -0.1  # minus what a completion still has to pay from one of its tokens on
    blind, data, trainer = build(tmp_path / "blind", pair, baselines)
    blind.objective.terms[1].objective.baseline = NoBaseline()
    trainer.fit(blind, data)
    assert not same(weights(module), weights(blind))


def test_a_group_of_one_has_nobody_to_compare_with(pair: tuple[Path, Path]) -> None:
    module = tiny_module(pair, baselines())
    assert len(RolloutRefresh(rollouts_per_prompt=2).declare(module)) == 1
    with pytest.raises(ValueError, match=r"rollout\.rollouts_per_prompt=1 .*BatchMean"):
        RolloutRefresh().declare(module)


def test_the_reference_stays_where_the_student_started(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, trainer = build(tmp_path, pair, several)
    trainer.fit(module, data)
    start = tiny_module(pair, several())
    start.configure_model()
    kept = module.reference.own_model()
    assert kept is not None
    for (name, then), now in zip(start.student.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(then, now), name
    assert not any(name.startswith("reference") for name, _ in module.named_parameters())
    assert not same(weights(module), weights(start))


def test_a_reference_that_nobody_needs_is_not_loaded(pair: tuple[Path, Path]) -> None:
    module = tiny_module(pair, reference=FrozenTeacher("nowhere/at/all"))
    module.configure_model()
    assert module.reference.own_model() is None
