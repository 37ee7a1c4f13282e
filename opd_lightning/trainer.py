"""OPDTrainer: Lightning's Trainer with the callbacks that a distillation run needs, and two more verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning import memory, strategies
from opd_lightning.callbacks import (
    Alarms,
    ColdStart,
    CompletionEval,
    FiniteLoss,
    GracefulStop,
    OPDCheckpoint,
    OPDProgressBar,
    PositionMap,
    RNGState,
    RolloutRefresh,
    RunCard,
    TeacherUpdate,
    TimeTable,
    TokenRecords,
    TrainMonitor,
    Watchdog,
)
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.data.prompts import GivenPrompts
from opd_lightning.models.export import prove_export
from opd_lightning.module import OPDModule

DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/opd",
    "inference_mode": False,  # inference tensors before the first training step break FSDP2
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
FIRST = (ColdStart, RolloutRefresh, CompletionEval)
"""Set up before all others, in this order: each sets what the next ones, and callbacks like EarlyStopping, read."""
LAST = (Alarms, RunCard)
"""Called after all others, whose logged values they read."""
CORE = (
    *(TeacherUpdate, RNGState, TimeTable, TrainMonitor, PositionMap, TokenRecords),
    *(Alarms, RunCard, FiniteLoss, GracefulStop, Watchdog, OPDCheckpoint),
)


class OPDTrainer(pl.Trainer):
    """Lightning's Trainer. Missing core callbacks (teacher updates, random states, monitors, token records, alarms, run card,
    checkpoints, clean stop, NaN guard, watchdog, progress bar) and a CSV logger below ``default_root_dir`` are added;
    everything else is Lightning's own. On a CPU the process keeps the memory that it frees (see
    `opd_lightning.memory`).

    Args:
        float32_matmul: precision of float32 matrix products: ``highest``, ``high`` or ``medium``, as in
            `torch.set_float32_matmul_precision`; null leaves torch's own. What a lower one does depends on the machine: two to
            three times faster on many CPUs, with float32's own relative error (4e-7) where they have no bfloat16 tiles (AMX),
            and bfloat16's (2e-3) where they do; TF32 (3e-4) on NVIDIA GPUs. The error on this machine is measured and printed.
        **kwargs: Lightning's.
    """

    def __init__(self, *, float32_matmul: Literal["highest", "high", "medium"] | None = None, **kwargs: Any) -> None:
        strategies.refuse_absent(kwargs.get("strategy"))
        kwargs = _with_core(kwargs)
        kwargs["strategy"] = strategies.own_strategy(kwargs.get("strategy", "auto"), kwargs.get("precision"))
        super().__init__(**kwargs)
        if self.strategy.root_device.type == "cpu":
            memory.keep_freed()
        if float32_matmul is not None:
            _set_precision(float32_matmul, self.strategy.root_device)

    def generate(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        prompt: list[str] | None = None,
        count: int = 8,
        who: Literal["student", "teacher"] = "student",
        out: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Write completions of the student (or the teacher) and show them.

        Args:
            prompt: prompts to continue; the held-out prompts of the data module if left out.
            count: how many held-out prompts.
            who: who writes.
            out: JSON-lines file for the completions, beside the terminal.
            ckpt_path: checkpoint of the student; the untrained student if left out.

        Raises:
            ValueError: without any prompt.
        """
        assert isinstance(model, OPDModule)
        assert isinstance(datamodule, PromptDataModule)
        if prompt:
            datamodule.replace_prompts(GivenPrompts(prompt))
        elif not datamodule.held_out and datamodule.held_out_prompts is None:
            raise ValueError("no held-out prompts: give --prompt '[\"...\"]', data.held_out or data.held_out_prompts")
        datamodule.limit_held_out = None if prompt else count
        model.writer = who
        batches: Any = self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        records = [record for batch in batches for record in batch]
        for record in records:
            print(f"> {record['prompt']}\n{record['completion']}\n")
        if out is not None:
            Path(out).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        folder: str = "exported",
        merge: bool = False,
        gguf: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        """Write the student as a Hugging Face folder that plain transformers (and peft) loads, or as a GGUF file; load it again
        and compare.

        Args:
            folder: target folder.
            merge: fold a LoRA adapter into the weights; else the adapter is written alone.
            gguf: write one file, model.gguf, for llama.cpp and its kin (llama, qwen2 and qwen3 architectures).
            ckpt_path: checkpoint of the student; the untrained student if left out.
        """
        assert isinstance(model, OPDModule)
        model.configure_model()
        if ckpt_path is not None:
            if Path(ckpt_path).is_dir():
                raise ValueError(f"{ckpt_path} is a sharded checkpoint: train with save_distributed_checkpoint false to export")
            state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            model.on_load_checkpoint(state)
            model.load_state_dict(state["state_dict"], strict=False)
        target = model.export(folder, merge, gguf)
        print(f"exported to {target}\n{prove_export(model._student, model.vocabulary, target)}")


def _set_precision(float32_matmul: str, device: torch.device) -> None:
    allowed = ("highest", "high", "medium")
    if float32_matmul not in allowed:
        raise ValueError(f"trainer.float32_matmul={float32_matmul!r}: allowed are {', '.join(allowed)}, or null")
    torch.set_float32_matmul_precision(float32_matmul)
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    error = float(((a.to(device) @ b.to(device)).cpu() - exact).norm() / exact.norm())
    rank_zero_info(
        f"float32 matrix products have a relative error of {error:.1e} here (trainer.float32_matmul={float32_matmul})"
    )


def _place(callback: pl.Callback) -> int:
    first = next((i for i, cls in enumerate(FIRST) if isinstance(callback, cls)), len(FIRST))
    return first + isinstance(callback, LAST)


def _with_core(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = {**DEFAULTS, **kwargs}
    callbacks = kwargs.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
    checkpointing = kwargs.get("enable_checkpointing") is not False
    for cls in CORE:
        if not any(isinstance(c, cls) for c in callbacks) and (cls is not OPDCheckpoint or checkpointing):
            callbacks.append(cls())
    callbacks.sort(key=_place)
    if kwargs.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(OPDProgressBar())
    if kwargs.get("logger") in (None, True):
        kwargs["logger"] = CSVLogger(kwargs["default_root_dir"] or ".", name="logs", flush_logs_every_n_steps=10)
    return {**kwargs, "callbacks": callbacks}
