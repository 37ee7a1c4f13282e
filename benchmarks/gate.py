"""A callback that makes a whole `opd fit` wait between optimizer steps for the script that times it.

A step begins when the refresh of its rollouts is asked for and ends when the next refresh is asked for: everything that
Lightning, the callbacks and the loggers do lies inside.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning.module import OPDModule
from protocol import answer, orders, peak_rss, versions

NEVER = (-1,)
"""End tokens of a run in which every completion has the full length."""
PHASES = {
    "rollout": "rollout",
    "teacher forward": "teacher",
    "student forward": "student",
    "heads and loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
}
"""The phases of the framework's clock, by the names that both sides' tables use."""


PACKAGES = ("torch", "transformers", "lightning")


class Gate(pl.Callback):
    """Waits for orders between steps.

    Args:
        eos: False lets no completion end before the length limit.
    """

    def __init__(self, eos: bool = False) -> None:
        self.eos = eos
        self.started: float | None = None
        self.before: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OPDModule)
        if not self.eos:
            pl_module.__dict__["vocabulary"] = replace(pl_module.vocabulary, eos_ids=NEVER)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, OPDModule)
        buffer = trainer.datamodule.buffer  # type: ignore[attr-defined]
        refill: Callable[[int], None] = buffer.refill

        def gated(refresh: int) -> None:
            self._wait(trainer, pl_module)
            refill(refresh)

        buffer.refill = gated

    def _wait(self, trainer: pl.Trainer, pl_module: OPDModule) -> None:
        """Answer for the step that has ended, then obey until the next one is ordered."""
        found: dict[str, Any] = self._step(pl_module) if self.started is not None else {"versions": versions(*PACKAGES)}
        buffer = trainer.datamodule.buffer  # type: ignore[attr-defined]
        if buffer.rollout is not None:
            found["tokens"] = int(buffer.rollout.mask.sum())
        found["loss"] = float(trainer.callback_metrics.get("train/loss", float("nan")))
        answer(**found, peak_rss=peak_rss(), **_on_gpu())
        for order in orders():
            if order["do"] == "step":
                torch.set_float32_matmul_precision(order.get("matmul", "highest"))
                pl_module.clock.exact = True  # phases on a GPU too, as the peers' are taken
                self.before, self.started = pl_module.clock.read(), time.perf_counter()
                return
            if order["do"] == "save":
                answer(folder=str(pl_module.export(order["folder"])))
            elif order["do"] == "check":
                answer(**agreement(pl_module, buffer.rollout, order.get("rows", 2)))
        os._exit(0)  # the other side closed the pipe

    def _step(self, pl_module: OPDModule) -> dict[str, Any]:
        """Seconds of the step that has ended, and of its phases by the framework's own clock."""
        assert self.started is not None
        spent = pl_module.clock.read()
        seconds = time.perf_counter() - self.started
        phases = {short: spent.get(name, 0.0) - self.before.get(name, 0.0) for name, short in PHASES.items()}
        return {"seconds": seconds, "phases": {**phases, "other": seconds - sum(phases.values())}}


def _on_gpu() -> dict[str, int]:
    return {"peak_gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def agreement(module: OPDModule, rollout: Any, rows: int) -> dict[str, float]:
    """Relative error of loss and of the gradient of all weights against whole logits, on some of the last rollouts.

    Both sides run with float64 copies of the weights: in float32 the backward pass through the layers alone differs by 6e-5
    between two orders of summation, and would hide what is looked for.
    """
    torch.set_float32_matmul_precision("highest")
    part = replace(rollout.select(torch.arange(min(rows, len(rollout)))), scale=()).to(module.device)
    teacher: Any = module.teacher
    student, kept = copy.deepcopy(module._student).double(), (module.student, teacher.model)
    module.student, teacher.model = student, copy.deepcopy(teacher.model).double()
    try:
        student.zero_grad()
        loss = module.score(part, module.objective).loss
        loss.backward()
        ours = _gradient(student)
        student.zero_grad()
        naive = reverse_kl(student, teacher.model, part, module.vocabulary.size)
        naive.backward()
        theirs = _gradient(student)
    finally:
        module.student, teacher.model = kept
    return {
        "loss_error": abs(loss.item() - naive.item()) / abs(naive.item()),
        "gradient_error": float((ours - theirs).norm() / theirs.norm()),
    }


def reverse_kl(student: Any, teacher: Any, rollout: Any, vocab: int) -> torch.Tensor:
    """Mean over completion tokens of KL(student ‖ teacher), from whole logits of both models."""
    ids = rollout.text.ids
    with torch.no_grad():
        theirs = teacher(input_ids=ids).logits[:, :-1, :vocab].log_softmax(-1)
    ours = student(input_ids=ids).logits[:, :-1, :vocab].log_softmax(-1)
    divergence: torch.Tensor = (ours.exp() * (ours - theirs)).sum(-1)[rollout.mask]
    return divergence.mean()


def _gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1).double() for p in model.parameters() if p.grad is not None])
