"""Steps in which every rank writes completions of its own length, drawn at random. Run by test_uneven.py."""

from __future__ import annotations

import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from opd_lightning import parallel, strategies
from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Completion
from tests.helpers import tiny_data, tiny_module, tiny_trainer

LONGEST = 32
STRATEGIES = {"ddp": DDPStrategy, "fsdp": strategies.FSDP1Strategy, "fsdp2": strategies.FSDP2Strategy}


class Uneven(NativeSampler):
    """Another limit at every call, and another one on every rank."""

    def write(self, *args: Any) -> list[Completion]:
        self.calls = getattr(self, "calls", 0) + 1
        self.max_new_tokens = random.Random(f"{parallel.rank()}/{self.calls}").randint(1, LONGEST)
        return super().write(*args)


class Longest(pl.Callback):
    """The longest completion of every step."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.lengths.append(int(batch.mask.sum(-1).max()))


if __name__ == "__main__":
    root, student, teacher, strategy, pairs = sys.argv[1:]
    pl.seed_everything(0, verbose=False)
    longest = Longest()
    rollout = RolloutRefresh(sampler=Uneven(), seed=5)
    chosen = STRATEGIES[strategy](timeout=timedelta(seconds=60))  # a hang fails instead of waiting half an hour
    trainer = tiny_trainer(
        Path(root), [rollout, longest], max_steps=int(pairs), devices=2, strategy=chosen, enable_checkpointing=False
    )
    module = tiny_module((Path(student), Path(teacher)))
    trainer.fit(module, tiny_data(held_out=0, batch_size=4))
    lengths = parallel.gather_objects(longest.lengths)
    weights = parallel.gather_objects(parallel.full_state_dict(module.student))
    if parallel.rank() == 0:
        torch.save({"lengths": lengths, "weights": weights}, Path(root) / f"{strategy}.pt")
