"""Short LoRA runs under several strategies on two processes, and resumptions across them. Run by test_swap.py."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.models import LoRA
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer


def run(root: Path, pair: tuple[Path, Path], strategy: str, devices: int, micro: int, lora: bool, resume: str = "") -> dict:
    """Five steps, two per refresh; checkpoints of every step in ``root``. Returns whole final weights and measurements."""
    pl.seed_everything(0, verbose=False)
    module = tiny_module(pair, lora=LoRA(r=4) if lora else None)
    evaluation = CompletionEval(every_n_steps=2, sampler=NativeSampler(max_new_tokens=8), seed=5)
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), rollouts_per_prompt=2, every_n_steps=2, seed=5)
    callbacks = [rollout, evaluation, OPDCheckpoint(every_n_steps=1, keep=0)]
    trainer = tiny_trainer(root, callbacks, max_steps=5, devices=devices, strategy=strategy)
    trainer.fit(module, tiny_data(held_out=7, micro_batch_size=micro), ckpt_path=resume or None)
    whole = parallel.full_state_dict(module.student)
    return {"weights": {n: t for n, t in whole.items() if not lora or "lora_" in n}, "history": evaluation.history}


if __name__ == "__main__":
    root, student, teacher, *cases = sys.argv[1:]
    for case in cases:  # name:strategy:lora|full[:checkpoint of another case]
        name, strategy, kind, *resume = case.split(":")
        found = run(Path(root) / name, (Path(student), Path(teacher)), strategy, 2, 2, kind == "lora", *resume)
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{name}.pt")
