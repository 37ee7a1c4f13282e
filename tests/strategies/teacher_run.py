"""Short runs with teachers that follow the student, under several strategies. Run by test_teachers.py."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.data import Addition, PlainTemplate, SiblingSuccess, TaskPrompts
from opd_lightning.data.prompts import Row
from opd_lightning.metrics import Grader
from opd_lightning.models import (
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    LiveTeacher,
    LoRA,
    RoutedTeacher,
    Teacher,
    TrustRegionTeacher,
)
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer
from tests.strategies.swap_run import EPS


def teacher_of(kind: str, big: Path) -> Teacher:
    if kind in ("ema", "siblings"):
        return EMATeacher(0.2)
    if kind == "live":
        return LiveTeacher()
    if kind == "trust":
        return TrustRegionTeacher(0.5, max_kl=0.05)
    if kind == "ensemble":
        return EnsembleTeacher([FrozenTeacher(str(big)), EMATeacher(0.2, every=2)])
    # most micro-batches have no row for one of the experts, on one rank or on both
    return RoutedTeacher({"rare": FrozenTeacher(str(big)), "rest": EMATeacher(0.2)})


class Odd(Grader):
    """Completions of odd length succeed."""

    def __call__(self, row: Row, completion: str) -> float:
        return float(len(completion) % 2)


class Domains(TaskPrompts):
    """Additions, every third of them in a domain of its own."""

    def rows(self) -> list[Row]:
        return [{**row, "domain": "rest" if i % 3 else "rare"} for i, row in enumerate(super().rows())]


def run(root: Path, pair: tuple[Path, Path], strategy: str, devices: int, kind: str, lora: bool, resume: str = "") -> dict:
    """Four steps, two per refresh; returns whole weights of student and teacher, and measurements."""
    pl.seed_everything(0, verbose=False)
    module = tiny_module(pair, lora=LoRA(r=4) if lora else None, teacher=teacher_of(kind, pair[1]), eps=EPS)
    siblings = kind == "siblings"
    sampler = NativeSampler(max_new_tokens=8)
    evaluation = CompletionEval(every_n_steps=2, sampler=sampler, samples_per_prompt=4 if siblings else 1, seed=5)
    group = 8 if siblings else 2  # eight lie on both ranks
    rollout = RolloutRefresh(sampler=sampler, rollouts_per_prompt=group, every_n_steps=2, seed=5)
    trainer = tiny_trainer(
        root, [rollout, evaluation, OPDCheckpoint(every_n_steps=1, keep=0)], max_steps=4, devices=devices, strategy=strategy
    )
    context = SiblingSuccess(grader=Odd(), wording="{prompt}{information}") if siblings else PlainTemplate(prefix="7")
    prompts = Domains(Addition(digits=2), size=40, seed=3)
    data = tiny_data(prompts=prompts, held_out=7, micro_batch_size=2, template=PlainTemplate(), teacher_template=context)
    trainer.fit(module, data, ckpt_path=resume or None)
    whole = parallel.full_state_dict(module.student)
    return {
        "weights": {n: t for n, t in whole.items() if not lora or "lora_" in n},
        "teachers": {name: leaf.state_dict() for name, leaf in module._leaves().items()},
        "history": evaluation.history,
    }


if __name__ == "__main__":
    root, student, teacher, *cases = sys.argv[1:]
    for case in cases:  # name:strategy:kind:lora|full[:checkpoint of another case]
        name, strategy, kind, size, *resume = case.split(":")
        found = run(Path(root) / name, (Path(student), Path(teacher)), strategy, 2, kind, size == "lora", *resume)
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{name}.pt")
