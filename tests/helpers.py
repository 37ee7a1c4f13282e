"""Builders shared by tests: a tiny run in Python, without the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_lightning.callbacks import CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.data import Addition, PromptDataModule, TaskPrompts
from opd_lightning.models import FrozenTeacher, LoRA, Student
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler
from opd_lightning.trainer import OPDTrainer


def tiny_module(
    pair: tuple[Path, Path], objective: Objective | None = None, lora: LoRA | None = None, **kwargs: Any
) -> OPDModule:
    student, teacher = map(str, pair)
    return OPDModule(
        Student(student, lora=lora),
        kwargs.pop("teacher", None) or FrozenTeacher(teacher),
        objective or Objective(ReverseKL()),
        optimizer=partial(torch.optim.AdamW, lr=kwargs.pop("lr", 1e-2), eps=kwargs.pop("eps", 1e-8)),
        **kwargs,
    )


def tiny_data(**kwargs: Any) -> PromptDataModule:
    settings = {"prompts": TaskPrompts(Addition(digits=2), size=40, seed=3), "held_out": 8, "batch_size": 8, "seed": 5}
    return PromptDataModule(**{**settings, **kwargs})


def tiny_trainer(root: Path, callbacks: list[Any] | None = None, **kwargs: Any) -> OPDTrainer:
    settings = {
        "max_steps": 4,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(root),
        "enable_progress_bar": False,
        "logger": False,
    }
    found = list(callbacks or [])
    if not any(isinstance(c, RolloutRefresh) for c in found):
        found.append(RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), seed=5))
    return OPDTrainer(callbacks=found, **{**settings, **kwargs})


def weights(module: OPDModule) -> dict[str, torch.Tensor]:
    assert module.student is not None
    return {n: p.detach().clone() for n, p in module.student.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


__all__ = ["CompletionEval", "OPDCheckpoint", "same", "tiny_data", "tiny_module", "tiny_trainer", "weights"]
