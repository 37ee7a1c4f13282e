"""A run of two ranks of which the second falls asleep. Run by test_watchdog.py."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from opd_lightning.callbacks import RolloutRefresh, Watchdog
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer


class Sleeper(NativeSampler):
    """Sleeps while it should write the rollouts of step 2, on the second rank."""

    def write(self, *args: Any) -> Any:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            fall_asleep()
        return super().write(*args)


def fall_asleep() -> None:
    time.sleep(float(sleep))


if __name__ == "__main__":
    root, student, teacher, patience, sleep, timeout = sys.argv[1:]
    pl.seed_everything(0, verbose=False)
    strategy = DDPStrategy(timeout=timedelta(seconds=float(timeout)))
    callbacks = [RolloutRefresh(sampler=Sleeper(max_new_tokens=4), seed=5), Watchdog(seconds=float(patience))]
    trainer = tiny_trainer(Path(root), callbacks, devices=2, strategy=strategy, enable_checkpointing=False)
    trainer.fit(tiny_module((Path(student), Path(teacher))), tiny_data(held_out=0))
