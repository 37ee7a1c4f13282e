"""What the process frees stays with it, and what nothing needs is freed."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.helpers import tiny_data, tiny_module, tiny_trainer

PROGRAM = """
from opd_lightning.memory import keep_freed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if {kept}:
    assert keep_freed() and keep_freed()
before = resident()
blocks = [b"x" * 2**26, b"y" * 2**26]
assert resident() - before > 1.9 * 2**26
del blocks
print((resident() - before) / 2**27)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="the C library is not glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_large_blocks_stay_only_where_that_was_asked_for(kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(kept=kept)], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.9 if kept else float(done.stdout) < 0.1


class Watch(pl.Callback):
    """Parameters that hold a gradient while no backward pass needs one."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.held.append(sum(p.grad is not None for p in pl_module.parameters()))


def test_gradients_are_not_kept_while_the_next_rollouts_are_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    watch = Watch()
    trainer = tiny_trainer(tmp_path, [watch], max_steps=2)
    trainer.fit(tiny_module(pair), datamodule=tiny_data(micro_batch_size=4))
    assert [bool(n) for n in watch.held] == [True, False, True, False]  # two micro-batches a step
