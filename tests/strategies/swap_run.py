"""Short runs under several strategies on two processes, and resumptions across them. Run by test_swap.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.models import LoRA
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer

EPS = 1e-6
"""Of AdamW: beside 1e-8, an entry whose gradient is that small takes its step from the order in which ranks are summed."""


class Record(pl.Callback):
    """Every rollout by its number, and the loss of every optimizer step over all ranks."""

    def __init__(self) -> None:
        self.rollouts: dict[int, list[int]] = {}
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        mine = [
            (int(row), ids[:length].tolist())
            for row, ids, length in zip(batch.row, batch.text.ids, batch.text.lengths, strict=True)
        ]
        for rows in parallel.gather_objects(mine):
            self.rollouts |= dict(rows)
        step = batch_idx // trainer.accumulate_grad_batches
        loss = parallel.sum_over_ranks([float(outputs["loss"])])[0] / trainer.world_size
        self.losses[step] = self.losses.get(step, 0.0) + loss


def run(root: Path, pair: tuple[Path, Path], strategy: str, devices: int, micro: int, kind: str, resume: str = "") -> dict:
    """Five steps, two per refresh; checkpoints of every step in ``root``. Returns whole final weights and measurements.

    The kind is ``lora`` or ``full``, and may say ``+checkpointing`` (of activations) or ``+bfloat16`` (weights).
    """
    pl.seed_everything(0, verbose=False)
    lora = "lora" in kind
    module = tiny_module(pair, lora=LoRA(r=4) if lora else None, eps=EPS)
    module.recipe.gradient_checkpointing = "checkpointing" in kind
    module.recipe.dtype = "bfloat16" if "bfloat16" in kind else "float32"
    evaluation = CompletionEval(every_n_steps=2, sampler=NativeSampler(max_new_tokens=8), seed=5)
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), rollouts_per_prompt=2, every_n_steps=2, seed=5)
    record = Record()
    callbacks = [rollout, evaluation, record, OPDCheckpoint(every_n_steps=1, keep=0)]
    trainer = tiny_trainer(root, callbacks, max_steps=5, devices=devices, strategy=strategy)
    trainer.fit(module, tiny_data(held_out=7, micro_batch_size=micro), ckpt_path=resume or None)
    whole = parallel.full_state_dict(module.student)
    trained = {n: t for n, t in whole.items() if not lora or "lora_" in n}
    found = {"weights": trained, "history": evaluation.history, "rollouts": record.rollouts, "losses": record.losses}
    return found | {"norm": float(trainer.callback_metrics["train/gradient_norm"])}


if __name__ == "__main__":
    root, student, teacher, *cases = sys.argv[1:]
    for case in cases:  # name:strategy:kind[:checkpoint of another case]
        name, strategy, kind, *resume = case.split(":")
        found = run(Path(root) / name, (Path(student), Path(teacher)), strategy, 2, 2, kind, *resume)
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{name}.pt")
