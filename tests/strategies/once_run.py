"""Runs under FSDP2 whose weights the first process reads, or every process. Run by test_once.py."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import opd_lightning.module
from opd_lightning import parallel
from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.data import PlainTemplate
from opd_lightning.models import EMATeacher, FrozenTeacher, LoRA, Student
from opd_lightning.models.building import ReadOnce, build_all
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer
from tests.strategies.swap_run import Record


class ByEveryProcess(ReadOnce):
    """The ordinary way: a whole copy in each process."""

    def build(self) -> Any:
        return build_all(self.recipe, self.leaves, self.packed, share=False)


class Needy(Student):
    """Looks at its weights while it is built, which has none to look at on the meta device."""

    def weights(self) -> Any:
        model = super().weights()
        float(next(model.parameters()).sum())
        return model


class Peak(pl.Callback):
    """The most memory of this process until training begins, MB."""

    found = 0.0

    def on_fit_start(self, *_: Any) -> None:
        self.found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(root: Path, pair: tuple[Path, Path], kind: str, once: bool) -> dict:
    """Two steps. Returns weights and buffers of all networks as training begins, the student's weights as it ends, losses and
    rollouts.
    """
    pl.seed_everything(0, verbose=False)
    opd_lightning.module.ReadOnce = ReadOnce if once else ByEveryProcess  # type: ignore[attr-defined]
    recipe = Needy if "needy" in kind else Student
    module = tiny_module(pair, teacher=EMATeacher(0.2) if "ema" in kind else FrozenTeacher(str(pair[1])))
    module.recipe = recipe(
        str(pair[0]),
        dtype="bfloat16" if "bfloat16" in kind else "float32",
        lora=LoRA(r=4, dropout=0.1) if "lora" in kind else None,
        keep_layers=1 if "pruned" in kind else None,
        gradient_checkpointing="checkpointing" in kind,
    )
    record, begun = Record(), Begun()
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), seed=5)
    trainer = tiny_trainer(root, [rollout, record, begun], max_steps=2, devices=2, strategy="fsdp2")
    told = PlainTemplate(prefix="7")
    trainer.fit(module, tiny_data(micro_batch_size=2, template=PlainTemplate(), teacher_template=told))
    ended = parallel.full_state_dict(module.student)
    return {"begun": begun.found, "ended": ended, "losses": record.losses, "rollouts": record.rollouts}


def measure(root: Path, pair: tuple[Path, Path], once: bool) -> list[float]:
    """The most memory of each rank until training begins, MB."""
    opd_lightning.module.ReadOnce = ReadOnce if once else ByEveryProcess  # type: ignore[attr-defined]
    peak = Peak()
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=1), seed=5)
    trainer = tiny_trainer(root, [rollout, peak], max_steps=1, devices=2, strategy="fsdp2", enable_checkpointing=False)
    trainer.fit(tiny_module(pair), tiny_data(batch_size=2))
    return parallel.gather_objects(peak.found)


class Begun(pl.Callback):
    """Whole weights, and buffers of both ranks, of all networks."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.found: dict[str, torch.Tensor] = {}
        for i, network in enumerate((module.student, *module._own_models())):
            self.found |= {f"{i}.{n}": t for n, t in parallel.full_state_dict(network).items()}
            buffers = {n: b.clone() for n, b in network.named_buffers()}
            for rank, theirs in enumerate(parallel.gather_objects(buffers)):
                self.found |= {f"{i}.{n}@{rank}": b for n, b in theirs.items()}
            self.found[f"{i} attention"] = network.config._attn_implementation  # type: ignore[assignment]
            mine = [(hasattr(type(m), "stock"), m.training) for m in network.modules()]
            self.found[f"{i} fused, training"] = parallel.gather_objects(mine)  # type: ignore[assignment]


if __name__ == "__main__":
    root, student, teacher, *cases = sys.argv[1:]
    for case in cases:  # kind|memory:once|each
        kind, way = case.split(":")
        pair = Path(student), Path(teacher)
        found: Any
        if kind == "memory":
            found = measure(Path(root) / case, pair, way == "once")
        else:
            found = run(Path(root) / case, pair, kind, way == "once")
        if parallel.rank() == 0:
            torch.save(found, Path(root) / f"{case}.pt")
