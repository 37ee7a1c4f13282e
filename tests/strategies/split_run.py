"""Two optimizer steps, the second remembering the first, in float64 under a given split; writes loss and gradient.

Run by test_splits.py, also on two processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import AgreementMonitor, RolloutRefresh
from opd_lightning.callbacks.step_monitor import logged_at_step
from opd_lightning.data import Addition, TaskPrompts
from opd_lightning.models import FrozenTeacher, Student
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    Additive,
    BatchMean,
    Constant,
    GroupMean,
    Objective,
    OutcomeFilter,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    Term,
    Terms,
    TopK,
)
from opd_lightning.ops import fused
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_trainer

OBJECTIVES = {
    "token_mean": lambda: Objective(ReverseKL()),
    "sequence_mean": lambda: Objective(ReverseKL(), SampledToken(), ReturnToGo(), reduction=SequenceMean()),
    "constant": lambda: Objective(ReverseKL(), TopK(4, "union", "tail"), reduction=Constant(6.0)),
    "group_mean": lambda: Objective(ReverseKL(), SampledToken(), ReturnToGo(), GroupMean()),
    "batch_mean": lambda: Objective(ReverseKL(), SampledToken(), ReturnToGo(), BatchMean()),
    "graded": lambda: Terms(
        [
            Term(Objective(ReverseKL(), SampledToken(), outcome=Additive())),
            Term(Objective(ReverseKL(), outcome=OutcomeFilter()), weight=0.5),
        ]
    ),
}


class OddDigits(Addition):
    """A grade that an untrained model sometimes earns."""

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        return float(sum(map(str.isdigit, completion)) % 2)


class Keep(pl.Callback):
    """Loss of the optimizer steps over all ranks, and the gradient that reaches the optimizer last."""

    def __init__(self) -> None:
        self.loss, self.gradient, self.lengths = 0.0, {}, set()
        self.logged: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss += parallel.sum_over_ranks([float(outputs["loss"])])[0] / trainer.world_size
        self.lengths |= set(batch.mask.sum(-1).tolist())

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.logged = {key: value for key, value in logged_at_step(trainer).items() if "second" not in key}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.gradient = {n: p.grad.detach().clone() for n, p in module.student.named_parameters()}


def run(
    root: Path, pair: tuple[Path, Path], objective: str, devices: int, micro: int, packed: bool = True, digits: int = 2
) -> Keep:
    pl.seed_everything(0, verbose=False)
    module = OPDModule(
        Student(str(pair[0]), dtype="float64"),
        FrozenTeacher(str(pair[1]), dtype="float64"),
        OBJECTIVES[objective](),
        packed=packed,
    )
    keep = Keep()
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=12), rollouts_per_prompt=2, seed=5)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = tiny_trainer(
        root,
        [AgreementMonitor(k=4), rollout, keep],
        max_steps=2,
        devices=devices,
        strategy=strategy,
        enable_checkpointing=False,
    )
    prompts = TaskPrompts(OddDigits(digits=digits), size=40, seed=3)
    trainer.fit(module, tiny_data(prompts=prompts, held_out=0, micro_batch_size=micro))
    return keep


if __name__ == "__main__":
    root, student, teacher, *cases = sys.argv[1:]
    # The tests compare with one process that multiplies the whole head at once.
    fused.BLOCK, fused.TILE, fused.TOKENS, fused.GATHERED = 1, 64, 1, 1
    for case in cases:
        name, micro, digits = case.split(":")
        kept = run(Path(root), (Path(student), Path(teacher)), name, devices=2, micro=int(micro), digits=int(digits))
        if parallel.rank() == 0:
            torch.save({"loss": kept.loss, "logged": kept.logged, "gradient": kept.gradient}, Path(root) / f"{case}.pt")
