"""Arms that train: a real fit of `OPDModule` in the world of `opd_lightning.inspect.reproduce.digits`."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning.bars import only_the_outer
from opd_lightning.callbacks import (
    AgreementMonitor,
    ColdStart,
    CompletionEval,
    GracefulStop,
    Readiness,
    RolloutRefresh,
    TokenRecords,
)
from opd_lightning.callbacks.step_monitor import logged_at_step
from opd_lightning.data import PromptDataModule, TaskPrompts
from opd_lightning.inspect.reproduce.arms import Arm, Curve, Networks, Record, Tick, first_and_last
from opd_lightning.inspect.reproduce.digits import CHARACTERS, DigitSum, GrammarTeacher, continued, correct, prompts
from opd_lightning.models import FrozenTeacher, NewStudent, Student, Teacher
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ForwardKL, Objective, ReverseKL, WrittenToken
from opd_lightning.objectives.controls import WithoutSignal
from opd_lightning.samplers import NativeSampler
from opd_lightning.schedulers import WarmupDecay
from opd_lightning.sources import DatasetSource, GradedTeacher, Source, StudentSource, TeacherSource
from opd_lightning.trainer import OPDTrainer
from opd_lightning.types import Rollout

SIZES: dict[str, dict[str, Any]] = {
    "new": {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 96, "init_std": 0.1},
    "wide": {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 192, "init_std": 0.1},
    "tiny": {"hidden": 8, "layers": 2, "heads": 2, "intermediate": 16, "init_std": 0.1},
}
"""Random networks: the student's, 28 thousand parameters, one of 110 thousand and one of 2 thousand."""
HELD_OUT, HELD_OUT_SEED, TRAINED_ON = 256, 7, 4096
POINTS, RAREST = 10, 25
"""Held-out measurements of an arm, and most steps between two of them."""
METRIC_K = 4
"""Size of the top-k sets that are compared, whatever the objective's support is."""
KEPT = frozenset({"reverse_kl", "overlap", "student_overlap_mass", "teacher_overlap_mass", "overlap_advantage", "entropy_gap"})
KEPT |= {"student_entropy", "gradient_norm", "loss"}
"""What is kept of a step, of all that is logged."""
GOOD = 0.9
"""Accuracy from which on `steps_to_90` counts a run as having arrived."""


class RightAnswer(WithoutSignal):
    """Reinforcement from verified answers: every token has its completion's score, normalised within the prompt's group."""

    control = "verified answers: 1 for a right completion, 0 for a wrong one, normalised within its group"
    digits = 6

    def signal(self, rollout: Rollout) -> Tensor:
        score = correct(rollout.text.ids, self.digits).double()
        own = (rollout.group[:, None] == rollout.group).double()
        mean = own @ score / own.sum(-1)
        spread = (own @ score.square() / own.sum(-1) - mean.square()).clamp(min=0.0).sqrt()
        advantage = (score - mean) / (spread + 0.05)
        return advantage[:, None].expand(rollout.mask.shape)[rollout.mask]


class Collector(pl.Callback):
    """Keeps what the monitors logged, step by step."""

    def __init__(self, tick: Tick) -> None:
        self.curves: dict[str, Curve] = {}
        self.tick = tick

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for key, value in logged_at_step(trainer).items():
            name = key.removeprefix("train/")
            if name in KEPT:
                self.curves.setdefault(name, []).append((trainer.global_step - 1, value))
        self.tick(trainer.global_step / trainer.max_steps)


class Training(Arm):
    """A fit of the toy student.

    Args:
        student: name of a network to begin with, or ``new`` for random weights, ``wide`` for more of them, ``tiny`` for fewer.
        teacher: name of a network, or a teacher.
        objective: what is descended.
        steps: optimizer steps.
        rate: learning rate of Adam.
        task: prompts and, for a `DatasetSource`, completions.
        batch: completions of a step.
        group: completions of a prompt.
        longest: tokens of a rollout; 0 lets every pattern end.
        source: who writes.
        cold_start: steps before, on what the teacher writes; where the teacher is no network, on the task's own completions.
        judged: held-out prompts; null takes those of the task.
    """

    # One argument a thing that recipes vary: more than ten.
    def __init__(
        self,
        student: str,
        teacher: str | Teacher,
        objective: Objective = Objective(ReverseKL()),
        steps: int = 100,
        rate: float = 1e-3,
        task: DigitSum = DigitSum(),
        batch: int = 64,
        group: int = 4,
        longest: int = 0,
        source: Source = StudentSource(),
        cold_start: int = 0,
        judged: DigitSum | None = None,
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self.steps, self.rate, self.task, self.judged = steps, rate, task, judged or task
        self.batch, self.group, self.source, self.cold_start = batch, group, source, cold_start
        self.whole = 2 * task.digits + 6
        self.longest = longest or self.whole
        named = [student, teacher] if isinstance(teacher, str) else [student]
        self.needs = tuple(name for name in named if name not in SIZES)
        self.work = 0.045 * (steps + cold_start)

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        with tempfile.TemporaryDirectory() as folder, quiet():
            pl.seed_everything(seed, verbose=False)
            module, evaluation, collector = self._module(seed, networks), self._evaluation(seed), Collector(tick)
            trainer = self._trainer(Path(folder), seed, evaluation, collector)
            trainer.fit(module, datamodule=self._data(seed))
            (cold,) = (c for c in trainer.callbacks if isinstance(c, ColdStart))  # type: ignore[attr-defined]
        if trainer.global_step < trainer.max_steps:  # a signal that the trainer has answered itself
            raise SystemExit(GracefulStop.EXIT_CODE)
        if keep is not None:
            part = keep.with_suffix(".part")
            module.export(part)
            part.replace(keep)
        curves, theirs = collector.curves, self._teacher_accuracy(evaluation, seed)
        history = [row for row in evaluation.history if row["who"] == "student"]
        for key in ("accuracy", "completion_tokens", "truncated"):
            curves[key] = [(row["step"], row[key]) for row in history]
        figures = first_and_last({name: curve for name, curve in curves.items() if name not in ("accuracy",)})
        first, last = history[0]["accuracy"], history[-1]["accuracy"]
        figures |= {"accuracy": last, "accuracy_start": first, "best": max(row["accuracy"] for row in history)}
        figures |= {f"accuracy_at_{row['step']}": row["accuracy"] for row in history}
        reached = [row["step"] for row in history if row["accuracy"] >= GOOD]
        figures["steps_to_90"] = min(reached, default=self.steps + self.cold_start)  # censored at the end
        if theirs is not None:
            gap = theirs - first
            figures |= {"teacher_accuracy": theirs, "recovery": (last - first) / gap if gap else 0.0}
            figures["best_recovery"] = (figures["best"] - first) / gap if gap else 0.0
        figures["cold_start_over"] = float(cold.end)
        thin = {name: curve[:: max(len(curve) // 60, 1)] for name, curve in curves.items()}
        return Record(figures, thin)

    # ---- the run's parts -------------------------------------------------------------------------------------------------
    def _module(self, seed: int, networks: Networks) -> OPDModule:
        new = self.student in SIZES
        path = "" if new else str(networks.path(self.student, seed))
        student = NewStudent(CHARACTERS, seed=seed, **SIZES[self.student]) if new else Student(path)
        teacher = FrozenTeacher(str(networks.path(self.teacher, seed))) if isinstance(self.teacher, str) else self.teacher
        adam = partial(torch.optim.AdamW, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.0)
        decay = (
            partial(WarmupDecay, warmup_steps=self.steps // 20, total_steps=4 * self.steps // 3, shape="cosine")
            if new
            else None
        )
        return OPDModule(student, teacher, self.objective, optimizer=adam, scheduler=decay)

    def _evaluation(self, seed: int) -> CompletionEval:
        steps = self.steps + self.cold_start
        every = steps if self.student in SIZES else max(min(steps // POINTS, RAREST), 1)
        return CompletionEval(every, sampler=NativeSampler(max_new_tokens=self.whole, batch_size=HELD_OUT), seed=seed)

    def _trainer(self, folder: Path, seed: int, evaluation: CompletionEval, collector: Collector) -> OPDTrainer:
        return OPDTrainer(
            max_steps=self.steps + self.cold_start,
            accelerator="cpu",
            devices=1,
            default_root_dir=str(folder),
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[
                self._cold_start(),
                self._refresh(seed),
                evaluation,
                AgreementMonitor(METRIC_K),
                TokenRecords(looks=0),
                collector,
            ],
        )

    def _refresh(self, seed: int) -> RolloutRefresh:
        sampler = NativeSampler(max_new_tokens=self.longest, batch_size=self.batch)
        return RolloutRefresh(self.source, sampler, rollouts_per_prompt=self.group, seed=seed)

    def _cold_start(self) -> ColdStart:
        text = TeacherSource() if isinstance(self.teacher, str) else DatasetSource()
        return ColdStart(self.cold_start, text, Objective(ForwardKL(), WrittenToken()))

    def _data(self, seed: int) -> PromptDataModule:
        wanted = max(TRAINED_ON, self.steps * self.batch // 4) if isinstance(self.source, DatasetSource) else TRAINED_ON
        size = min(wanted, min(len(numbers) for numbers in self.task.numbers) ** self.task.digits // 2)
        return PromptDataModule(
            TaskPrompts(self.task, size, seed, "train"),
            held_out_prompts=TaskPrompts(self.judged, HELD_OUT, HELD_OUT_SEED, "held_out"),
            batch_size=self.batch,
            seed=seed,
        )

    def _teacher_accuracy(self, evaluation: CompletionEval, seed: int) -> float | None:
        if isinstance(self.teacher, GrammarTeacher):
            asked = prompts(self.judged, HELD_OUT, HELD_OUT_SEED)
            done = continued(self.teacher.logprobs, asked, self.whole, torch.Generator().manual_seed(seed))
            return float(correct(done, self.task.digits).double().mean())
        rows = [row["accuracy"] for row in evaluation.history if row["who"] == "teacher"]
        return rows[0] if rows else None


class Started(Training):
    """A fit with a cold start that begins and ends by itself; ``steps`` are those of the whole run.

    Args:
        until: where it begins and ends; null takes all of ``most``.
        most: steps that it may take; the default is that of ``cold_start/auto.yaml``.
        text: who writes in it; the default, too, is that of ``cold_start/auto.yaml``.
        training: arguments of `Training`.
    """

    def __init__(self, until: Readiness | None, most: int = 1000, text: Source = GradedTeacher(), **training: Any) -> None:
        super().__init__(**training)
        self.until, self.most, self.text = until, most, text

    def _cold_start(self) -> ColdStart:
        return ColdStart(self.most, self.text, until=self.until)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about every fit, and without further progress bars."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "pytorch.utilities.rank_zero", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), only_the_outer():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
