"""Controls do what their name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import RolloutRefresh, TrainMonitor
from opd_lightning.data import Addition, PromptDataModule, TaskPrompts
from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.models import FrozenTeacher, LiveTeacher, Student
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    Constant,
    ConstantNegative,
    DegenerateObjective,
    ForwardKL,
    FullVocab,
    Objective,
    RandomReward,
    ReverseKL,
    SampledToken,
    ShuffledTeacher,
    Term,
    Terms,
    TopK,
)
from opd_lightning.objectives.controls import ShiftedLaws
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Rollout
from tests.helpers import tiny_trainer


def norm_after_one_step(root: Path, objective: Objective, teacher: Any) -> float:
    monitor = TrainMonitor()
    refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=24), seed=5)
    run = tiny_trainer(root, [monitor, refresh], max_steps=1, enable_checkpointing=False)
    data = PromptDataModule(TaskPrompts(Addition(), size=200, split="train"), batch_size=16, micro_batch_size=8, seed=5)
    run.fit(OPDModule(Student("zoo/addition/student"), teacher, objective), data)
    return monitor.logged["train/gradient_norm"]


@pytest.mark.parametrize(
    ("divergence", "support"),
    [(ReverseKL(), FullVocab()), (ForwardKL(), FullVocab()), (ReverseKL(), TopK(4)), (ReverseKL(), SampledToken())],
)
def test_the_gradient_towards_the_identity_teacher_vanishes(divergence: Any, support: Any, tmp_path: Path) -> None:
    norm = norm_after_one_step(tmp_path / "self", Objective(divergence, support, allow_degenerate=True), LiveTeacher())
    real = norm_after_one_step(tmp_path / "real", Objective(divergence, support), FrozenTeacher("zoo/addition/teacher"))
    assert norm < 1e-4 * real and real > 0.1


def test_the_identity_teacher_finds_a_biased_support(tmp_path: Path) -> None:
    biased = Objective(ReverseKL(), TopK(2, "student", "raw"), allow_degenerate=True)
    assert norm_after_one_step(tmp_path, biased, LiveTeacher()) > 1e-2


@pytest.mark.parametrize("shift", [1, 3, 6])
def test_shifted_laws_are_those_of_other_tokens(shift: int) -> None:
    table = torch.randn(7, 4)
    shifted = ShiftedLaws(TableLaws(table), shift)
    for start in range(7):
        for stop in range(start + 1, 8):
            expected = torch.stack([table[(n + shift) % 7] for n in range(start, stop)])
            torch.testing.assert_close(shifted.logits(start, stop), expected, rtol=0, atol=0)
    assert (len(shifted), shifted.vocab) == (7, 4)


def rollout_of(world: TabularWorld) -> tuple[Rollout, torch.Tensor]:
    """Every completion of a world, a row each, and the states of their tokens."""
    rows = [world.rollout(path, "student") for path in world.paths]
    joined = Rollout.cat([Rollout(**{**vars(r), "row": torch.tensor([i])}) for i, r in enumerate(rows)])
    return joined, torch.tensor([s for path in world.paths for s in path.states])


def test_the_shuffled_teacher_is_never_asked_about_the_state_itself() -> None:
    world = TabularWorld.random(vocab=4, horizon=2, seed=1)
    rollout, states = rollout_of(world)
    student, teacher = TableLaws(world.student[states]), TableLaws(torch.arange(len(states) * 4.0).view(-1, 4))
    control = ShuffledTeacher(ReverseKL(), allow_degenerate=True)
    plain = Objective(ReverseKL())(student, teacher, rollout).stats.values["reverse_kl"]
    found = control(student, teacher, rollout).stats.values["reverse_kl"]
    candidates = [plain_of(student.table, teacher.table.roll(-shift, 0)) for shift in range(1, len(states))]
    assert sum(torch.allclose(found.double(), c, atol=1e-6) for c in candidates) >= 1
    assert torch.allclose(plain.double(), plain_of(student.table, teacher.table), atol=1e-6)
    again = control(student, teacher, rollout).stats.values["reverse_kl"]
    torch.testing.assert_close(again, found, rtol=0, atol=0)  # the same rollouts, the same shift


def plain_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p, q = student.detach().double().softmax(-1), teacher.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_a_constant_advantage_moves_nothing_in_expectation() -> None:
    """Every completion enumerated, in float64."""
    world = TabularWorld.random(vocab=4, horizon=3, seed=2, eos=3)
    settings: dict[str, Any] = {"reduction": Constant(1.0), "support": SampledToken(), "allow_degenerate": True}
    control = world.moments_of(ConstantNegative(ReverseKL(), **settings))
    assert control.mean.abs().max() < 1e-12
    assert control.trace > 1.0  # not because there were no gradient: every single one is
    assert world.moments_of(Objective(ReverseKL(), **settings)).mean.abs().max() > 0.01


def test_the_gradient_of_one_rollout_is_minus_the_signal_times_the_score() -> None:
    world = TabularWorld.random(vocab=4, horizon=3, seed=2, eos=3)
    rollout, states = rollout_of(world)
    tokens = rollout.text.targets[rollout.mask]
    settings: dict[str, Any] = {"reduction": Constant(1.0), "support": SampledToken(), "allow_degenerate": True}
    noise = RandomReward(ReverseKL(), **settings).signal(rollout).double()
    for objective, signal in (
        (ConstantNegative(ReverseKL(), **settings), torch.full_like(noise, -1.0)),
        (RandomReward(ReverseKL(), **settings), noise),
    ):
        out = objective(TableLaws(world.student[states]), TableLaws(world.teacher[states]), rollout)
        (found,) = torch.autograd.grad(out.loss, world.student)
        picked = world.student[states].log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        (expected,) = torch.autograd.grad(-(signal * picked).sum(), world.student)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_random_rewards_belong_to_their_rollout_however_the_step_is_cut_up() -> None:
    world = TabularWorld.random(vocab=4, horizon=3, seed=2)
    rollout, _ = rollout_of(world)
    control = RandomReward(ReverseKL(), SampledToken(), allow_degenerate=True)
    whole = control.signal(rollout)
    parts = [control.signal(rollout.select(torch.arange(i, min(i + 10, len(rollout))))) for i in range(0, len(rollout), 10)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    assert len(whole) == 192 and abs(whole.mean()) < 0.3 and abs(whole.std() - 1.0) < 0.2


def test_controls_declare_nothing_and_are_refused_unless_allowed() -> None:
    with pytest.raises(DegenerateObjective, match="a control experiment"):
        ShuffledTeacher(ReverseKL())
    assert ShuffledTeacher(ReverseKL(), allow_degenerate=True).declared_target.name == "none"
    for support in (FullVocab(), TopK(4, closure="sampled_tail")):
        with pytest.raises(DegenerateObjective, match="replaces the signal of drawn tokens"):
            RandomReward(ReverseKL(), support, allow_degenerate=True)
    with pytest.raises(ValueError, match="is a control; it stands alone"):
        Terms([Term(ConstantNegative(ReverseKL(), SampledToken(), allow_degenerate=True))])
