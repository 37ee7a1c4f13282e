"""Crashes, signals, full disks, damaged files, NaN: what is left always resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import GracefulStop, OPDCheckpoint, RolloutRefresh
from opd_lightning.callbacks.recovery import checkpoints, last_checkpoint
from opd_lightning.models import LoRA
from opd_lightning.samplers import NativeSampler
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

SAMPLER = NativeSampler(max_new_tokens=6)


class At(pl.Callback):
    """Do something at the start of a given micro-batch."""

    def __init__(self, micro_batch: int, action: Any) -> None:
        self.micro_batch, self.action = micro_batch, action

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.micro_batch:
            self.action(trainer, module)


def build(root: Path, pair: tuple[Path, Path], *callbacks: Any, **trainer: Any) -> tuple[Any, Any, Any]:
    pl.seed_everything(3, verbose=False)
    module = tiny_module(pair, lora=LoRA(r=4, dropout=0.2))
    rollout = RolloutRefresh(sampler=SAMPLER, every_n_steps=2, seed=5)
    run = tiny_trainer(root, [rollout, OPDCheckpoint(every_n_steps=2, keep=0), *callbacks], **{"max_steps": 6, **trainer})
    return module, tiny_data(micro_batch_size=2), run


def uninterrupted(pair: tuple[Path, Path], root: Path) -> dict[str, torch.Tensor]:
    module, data, run = build(root, pair)
    run.fit(module, data)
    return weights(module)


def test_sigterm_ends_at_an_optimizer_step_and_resumes_exactly(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = uninterrupted(pair, tmp_path / "whole")
    stop = GracefulStop()
    # micro-batch 9 of windows of 4: in the middle of the third optimizer step
    kill = At(9, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    module, data, run = build(tmp_path / "run", pair, stop, kill)
    run.fit(module, data)
    assert stop.stopped and run.global_step == 3
    last = last_checkpoint(tmp_path / "run")
    assert last.name == "step-000003.ckpt"
    module, data, run = build(tmp_path / "run", pair)
    run.fit(module, data, ckpt_path=str(last))
    assert same(weights(module), expected)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back


def test_a_crash_in_a_step_leaves_the_last_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = uninterrupted(pair, tmp_path / "whole")

    def fail(*_: Any) -> None:
        raise RuntimeError("the machine caught fire")

    module, data, run = build(tmp_path / "run", pair, At(18, fail))
    with pytest.raises(RuntimeError, match="caught fire"):
        run.fit(module, data)
    last = last_checkpoint(tmp_path / "run")
    assert last.name == "step-000004.ckpt"
    module, data, run = build(tmp_path / "run", pair)
    run.fit(module, data, ckpt_path=str(last))
    assert same(weights(module), expected)


def test_a_loss_that_is_not_finite_stops_before_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, run = build(tmp_path, pair)
    original, calls = module.score, []

    def score(rollout: Any, *arguments: Any) -> Any:
        out = original(rollout, *arguments)
        calls.append(1)
        return out if len(calls) != 10 else type(out)(out.loss * float("nan"), out.token_loss, out.stats)

    module.score = score
    with pytest.raises(FloatingPointError, match="optimizer step 2"):
        run.fit(module, data)
    assert all(torch.isfinite(w).all() for w in weights(module).values())
    assert last_checkpoint(tmp_path).name == "step-000002.ckpt"


def test_a_damaged_checkpoint_is_named_and_passed_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, run = build(tmp_path, pair)
    run.fit(module, data)
    newest = checkpoints(tmp_path / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"step-000006\.ckpt is damaged"):
        assert last_checkpoint(tmp_path).name == "step-000004.ckpt"


def test_a_full_disk_loses_one_checkpoint_and_says_so(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data, run = build(tmp_path, pair)
    original = run.save_checkpoint

    def save(path: Path, *arguments: Any, **keys: Any) -> None:
        if "000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(path, *arguments, **keys)

    monkeypatch.setattr(run, "save_checkpoint", save)
    with pytest.warns(UserWarning, match="No space left on device"):
        run.fit(module, data)
    names = [f.name for f in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000002.ckpt", "step-000006.ckpt"]  # no half file is left


def test_only_the_newest_are_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data, run = build(tmp_path, pair)
    for c in run.callbacks:
        if isinstance(c, OPDCheckpoint):
            c.every_n_steps, c.keep = 1, 2
    run.fit(module, data)
    assert [f.name for f in checkpoints(tmp_path / "checkpoints")] == ["step-000006.ckpt", "step-000005.ckpt"]
