"""Short runs on two processes with what lives beside them: a teacher server, an engine, a thread, a cold start that ends by
itself. Run by test_ranks.py and test_vllm.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import ColdStart, OPDCheckpoint, Readiness, RolloutRefresh
from opd_lightning.models import ServerTeacher
from opd_lightning.objectives import ForwardKL, Objective, ReverseKL, SampledToken, TopK, TruncatedRatio
from opd_lightning.samplers import NativeSampler, VLLMSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer
from tests.strategies.swap_run import Record

OPTIONS = ["--max-model-len", "128", "--max-num-seqs", "64", "--enforce-eager"]


def run(
    root: Path, pair: tuple[Path, Path], strategy: str, devices: int, kind: str, where: str = "", resume: str = ""
) -> dict[str, Any]:
    """Four steps. Returns whole final weights, rollouts, losses and what the kind measures.

    The kind is ``server``, ``until``, ``ahead`` or ``vllm``; ``where`` is the address of a server, the python of an
    engine, or the divergence below which the cold start ends.
    """
    pl.seed_everything(0, verbose=False)
    objective = Objective(ReverseKL())
    sampler, teacher, more = NativeSampler(max_new_tokens=8), None, []
    if kind == "server":
        objective = Objective(ReverseKL(), TopK(6, "teacher", "tail"))
        teacher = ServerTeacher(where, k=8, cache=str(root.parent / "answers"))
    elif kind == "vllm":
        objective = Objective(ReverseKL(), SampledToken(), correction=TruncatedRatio())
        sampler = VLLMSampler(python=where, options=OPTIONS, max_new_tokens=8)
    elif kind == "until":
        loose: Any = {"mass": (0.0, 0.0), "ends": (0.0, 0.0), "truncated": (1.0, 1.0), "near": 0.0}
        until = Readiness(**loose, reverse_kl=(float(where), float(where)), patience=1, every_n_steps=1, prompts=5, k=4)
        more = [ColdStart(steps=3, until=until, objective=Objective(ForwardKL()), reset_optimizer=True)]
    module = tiny_module(pair, objective, teacher=teacher, lr=2e-2 if kind == "until" else 1e-2)
    rollout = RolloutRefresh(sampler=sampler, seed=5, ahead="same" if kind == "ahead" else None)
    record, drift = Record(), Drift()
    callbacks = [*more, rollout, record, drift, OPDCheckpoint(every_n_steps=1, keep=0)]
    trainer = tiny_trainer(root, callbacks, max_steps=4, devices=devices, strategy=strategy)
    trainer.fit(module, tiny_data(micro_batch_size=4 // devices), ckpt_path=resume or None)
    found = {"weights": parallel.full_state_dict(module.student), "rollouts": record.rollouts, "losses": record.losses}
    found |= {"drift": drift.found, "history": more[0].history if more else []}
    asked = (teacher.asked, teacher.kept) if teacher is not None else (0, 0)
    return found | {"asked": parallel.gather_objects(asked)}


class Drift(pl.Callback):
    """How far the engine was from the trainer, at every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if "rollout/engine_drift" in trainer.callback_metrics:
            self.found.append(float(trainer.callback_metrics["rollout/engine_drift"]))


if __name__ == "__main__":
    root, student, teacher, where, *cases = sys.argv[1:]
    for case in cases:  # strategy:kind
        strategy, kind = case.split(":")
        found = run(Path(root) / case, (Path(student), Path(teacher)), strategy, 2, kind, where)
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{case}.pt")
