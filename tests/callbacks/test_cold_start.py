"""A cold start that begins and ends by itself, its graded text on disk, and that resuming is exact inside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import ColdStart, OPDCheckpoint, Readiness, RolloutRefresh
from opd_lightning.callbacks.readiness import Standing
from opd_lightning.data import Addition, TaskPrompts
from opd_lightning.models import FrozenTeacher, Student
from opd_lightning.objectives import ForwardKL, Objective
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import GradedTeacher
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

STEPS = 8
LOOSE = {"mass": (0.0, 0.0), "ends": (0.0, 0.0), "truncated": (1.0, 1.0), "near": 0.0}


def build(root: Path, pair: tuple[Path, Path], until: Readiness | None, steps: int = STEPS) -> tuple[Any, Any, Any, ColdStart]:
    pl.seed_everything(11, verbose=False)
    cold = ColdStart(steps=6, until=until, objective=Objective(ForwardKL()), reset_optimizer=True)
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), seed=5)
    callbacks = [cold, rollout, OPDCheckpoint(every_n_steps=1, keep=0)]
    return tiny_module(pair, lr=2e-2), tiny_data(), tiny_trainer(root, callbacks, max_steps=steps), cold


def readiness(limit: float, patience: int = 2) -> Readiness:
    return Readiness(**LOOSE, reverse_kl=(limit, limit), patience=patience, every_n_steps=1, prompts=6, k=4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def curve(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The divergence at every look of a phase that never ends by itself."""
    module, data, trainer, cold = build(tmp_path_factory.mktemp("curve"), pair, readiness(0.0))
    trainer.fit(module, data)
    assert cold.end == 6 and [row["step"] for row in cold.history] == list(map(float, range(6)))
    return [row["reverse_kl"] for row in cold.history]


@pytest.fixture(scope="module")
def ended(pair: tuple[Path, Path], curve: list[float], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, float]:
    """A run whose phase ends in the middle, at the second look in a row below the limit."""
    limit = sorted(curve)[2] + 1e-9
    below = [step for step in range(2, 6) if max(curve[step - 1 : step + 1]) <= limit]
    assert below, f"the toy's divergence never stays low: {curve}"
    root = tmp_path_factory.mktemp("ended")
    module, data, trainer, cold = build(root, pair, readiness(limit))
    trainer.fit(module, data)
    assert cold.end == below[0] and cold.over
    steps = {int(s["step"]) for s in trainer.optimizers[0].state.values()}
    assert steps == {STEPS - cold.end}  # the moments began anew where it ended
    return root, weights(module), limit


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resuming_inside_at_the_border_and_behind(
    step: int, ended: tuple[Path, dict, float], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    root, expected, limit = ended
    module, data, trainer, cold = build(tmp_path, pair, readiness(limit))
    trainer.fit(module, data, ckpt_path=str(root / f"checkpoints/step-{step:06d}.ckpt"))
    assert same(weights(module), expected)
    whole = torch.load(root / f"checkpoints/step-{STEPS:06d}.ckpt", weights_only=True)["callbacks"]["ColdStart"]
    assert cold.state_dict() == whole


def test_a_student_that_is_near_skips_it(pair: tuple[Path, Path], curve: list[float], tmp_path: Path) -> None:
    module, data, trainer, cold = build(tmp_path, pair, readiness(curve[0] + 0.1), steps=2)
    trainer.fit(module, data)
    assert cold.end == 0 and cold.over and len(cold.history) == 1
    assert module.phase_at(0) is None


def test_hysteresis() -> None:
    until = Readiness()
    between = Standing(0.9, 0.9, 0.3, 0.3, nearest_kl=2.0)
    assert until.lacking(between, entering=True) == []
    assert len(until.lacking(between, entering=False)) == 4
    far = Standing(0.7, 1.3, 0.05, 0.6, nearest_kl=1.3)
    assert [text.partition(" ")[0] for text in until.lacking(far, entering=True)] == ["overlap", "the", "reverse", "share"]
    some_near = until.lacking(replace(far, nearest_kl=1.25), entering=True)
    assert [text.partition(" ")[0] for text in some_near] == ["the", "share"]  # ends and lengths are judged in any case
    assert len(until.lacking(replace(far, nearest_kl=0.0), entering=False)) == 4
    assert len(Readiness(near=0.0).lacking(replace(far, nearest_kl=0.0), entering=True)) == 4
    with pytest.raises(ValueError, match="a share of the completions"):
        Readiness(near=2.0)
    with pytest.raises(ValueError, match="must be the larger one"):
        Readiness(mass=(0.9, 0.8))
    with pytest.raises(ValueError, match="must be the smaller one"):
        Readiness(reverse_kl=(0.5, 1.0))


# ---- text that is graded and kept -------------------------------------------------------------------------------------------


class Batches(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)


def on_zoo(root: Path, source: GradedTeacher, steps: int = 1) -> tuple[Any, Batches]:
    """The addition pair of the zoo, which writes solutions that the grader accepts."""
    pl.seed_everything(3, verbose=False)
    module = tiny_module((Path("zoo/addition/student"), Path("zoo/addition/teacher")), lr=1e-4)
    assert isinstance(module.recipe, Student) and isinstance(module.teacher, FrozenTeacher)
    batches = Batches()
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=48), seed=5)
    trainer = tiny_trainer(root, [ColdStart(steps=steps, source=source), rollout, batches], max_steps=steps)
    trainer.fit(module, tiny_data(prompts=TaskPrompts(Addition(digits=4), size=40, seed=3)))
    return module, batches


def test_only_right_answers_are_trained_on_and_they_are_read_again(tmp_path: Path) -> None:
    module, batches = on_zoo(tmp_path, GradedTeacher(folder=str(tmp_path / "kept")))
    (file,) = (tmp_path / "kept").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8
    grader = Addition(digits=4)
    for row in rows:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert not row["ids"] or grader({"answer": a + b}, module.vocabulary.decode(row["ids"])) == 1.0
    trained = [batches.seen[0].completion(i) for i in range(8)]
    assert sorted(map(tuple, trained)) == sorted(tuple(row["ids"]) for row in rows)
    eos = module.vocabulary.eos_ids[0]
    file.write_text("".join(json.dumps({**row, "ids": [5, eos], "logprobs": [0.0, 0.0]}) + "\n" for row in rows))
    _, again = on_zoo(tmp_path, GradedTeacher(folder=str(tmp_path / "kept")))
    assert [again.seen[0].completion(i) for i in range(8)] == [[5, eos]] * 8  # read, not written


def test_other_rules_have_other_files(tmp_path: Path) -> None:
    for source in (GradedTeacher(folder=str(tmp_path / "kept")), GradedTeacher(attempts=1, folder=str(tmp_path / "kept"))):
        on_zoo(tmp_path, source)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_teacher_whose_text_is_all_bad_trains_nothing_and_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module = tiny_module(pair)
    cold = ColdStart(steps=1, source=GradedTeacher(attempts=2))
    trainer = tiny_trainer(tmp_path, [cold], max_steps=1)
    before = {name: p.clone() for name, p in Student(str(pair[0])).build().named_parameters()}
    with pytest.warns(UserWarning, match="left out"):
        trainer.fit(module, tiny_data())
    decayed = max(float((p - before[n]).detach().abs().max()) for n, p in module.student.named_parameters())
    assert decayed < 1e-3  # AdamW's weight decay alone
    assert list((tmp_path / "teacher_text").iterdir())


def test_attempts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GradedTeacher(attempts=0)
