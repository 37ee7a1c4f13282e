"""Runs with images on two processes. Run by test_looking.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks import OPDCheckpoint, RolloutRefresh
from opd_lightning.data import ChatTemplate, JsonlPrompts, PromptDataModule
from opd_lightning.data.selectors import Selector
from opd_lightning.models import LoRA
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_module, tiny_trainer
from tests.looking import qwen_prompts, rows_with_images
from tests.strategies.swap_run import Record

STEPS = ("iiii tttt", "tttt tttt", "tiit ttit")
"""Rows of each optimizer step: about an image, or text alone; two ranks take half each, in micro-batches of two rows of like
length. In step 0 a rank has no image, in step 1 nobody has one, in step 2 some micro-batches are mixed."""
IMAGES = [mark == "i" for mark in "".join(STEPS).replace(" ", "")]
BATCH = len(IMAGES) // len(STEPS)


class InOrder(Selector):
    """As they stand in the file."""

    def order(self, prompts: Sequence[Any], scores: Any, epoch: int, seed: int) -> list[int]:
        return list(range(len(prompts)))


class Made(PromptDataModule):
    """Prompts that no processor has to make any more."""

    def setup(self, stage: str | None = None) -> None:
        sizes = ([(16, 8)], [(8, 24), (16, 16)], [(24, 24)])
        self.train_prompts = qwen_prompts([sizes[i % 3] if looks else [] for i, looks in enumerate(IMAGES)])


class Seen(pl.Callback):
    """Which rows of every micro-batch brought an image, on every rank."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        shown = batch.text.media or (None,) * len(batch)
        self.found.append(parallel.gather_objects("".join("t" if m is None else "i" for m in shown)))


def run(root: Path, pair: tuple[Path, Path], strategy: str, devices: int, kind: str, resume: str = "") -> dict[str, Any]:
    """Three steps of a student that looks. Returns whole trained weights and measurements.

    The kind is ``llava`` or ``qwen``, and may say ``+lora``.
    """
    pl.seed_everything(0, verbose=False)
    module = tiny_module(pair, lora=LoRA(r=2) if "lora" in kind else None)
    # biases of attention's keys have no gradient but rounding, which Adam would make into steps
    module.optimizer = partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
    root.mkdir(parents=True, exist_ok=True)
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=5), seed=5)
    record, seen = Record(), Seen()
    callbacks = [rollout, record, seen, OPDCheckpoint(every_n_steps=1, keep=0)]
    trainer = tiny_trainer(root, callbacks, max_steps=len(STEPS), devices=devices, strategy=strategy)
    made = Made if "qwen" in kind else PromptDataModule
    rows = JsonlPrompts(str(rows_with_images(root, IMAGES)))
    data = made(
        rows, selector=InOrder(), template=ChatTemplate(), batch_size=BATCH, micro_batch_size=BATCH // 2 // devices, seed=5
    )
    trainer.fit(module, data, ckpt_path=resume or None)
    whole = parallel.full_state_dict(module.student)
    trained = {n: t for n, t in whole.items() if "lora" not in kind or "lora_" in n}
    return {"weights": trained, "rollouts": record.rollouts, "losses": record.losses, "seen": seen.found}


if __name__ == "__main__":
    root, student, teacher, kind, *cases = sys.argv[1:]
    for case in cases:
        found = run(Path(root) / case, (Path(student), Path(teacher)), case, 2, kind)
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{case}.pt")
