"""CompletionTable: what the student writes, where a person looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning.callbacks.step_monitor import at_step_end
from opd_lightning.module import OPDModule
from opd_lightning.types import ObjectiveOutput, Rollout


class CompletionTable(pl.Callback):
    """Every some steps, a few rollouts as they were trained on: on the terminal, in ``<run>/samples.jsonl`` and, where the
    logger takes text, in the logger. Token by token they are in `TokenRecords`.

    Args:
        every_n_steps: optimizer steps between two looks; the first step is always shown.
        rows: rollouts shown each time.
        width: characters of a text on the terminal.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 2, width: int = 100) -> None:
        self.every_n_steps, self.rows, self.width = every_n_steps, rows, width

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not at_step_end(trainer) or not trainer.is_global_zero or (step != 1 and step % self.every_n_steps):
            return
        assert isinstance(pl_module, OPDModule)
        records = [self._record(trainer, pl_module, outputs["output"], batch, b) for b in range(min(self.rows, len(batch)))]
        say: Any = getattr(trainer.progress_bar_callback, "print", None)
        for record in records if say is not None else ():
            text = self._short(record["completion"])
            kl = f", kl {record['reverse_kl']:.3f}" if record["reverse_kl"] is not None else ""
            say(f"[step {step}] {self._short(record['prompt'])}\n    {record['writer']}{kl}: {text}")
        self._keep(trainer, records)

    def _record(
        self, trainer: pl.Trainer, module: OPDModule, output: ObjectiveOutput, batch: Rollout, b: int
    ) -> dict[str, Any]:
        before = int(batch.mask[:b].sum())
        tokens = slice(before, before + int(batch.mask[b].sum()))
        divergence = output.stats.values.get("reverse_kl")
        prompt_end = int(batch.text.lengths[b]) - int(batch.written[b].sum())
        return {
            "step": trainer.global_step,
            "prompt": module.vocabulary.decode(batch.text.ids[b, :prompt_end].tolist()),
            "completion": module.vocabulary.decode(batch.completion(b)),
            "writer": "student" if int(batch.policy_step[b]) >= 0 else "other",
            "ended": bool(batch.ended[b]),
            "reverse_kl": float(divergence[tokens].mean()) if divergence is not None else None,
        }

    def _short(self, text: str) -> str:
        flat = text.replace("\n", "\\n")
        return flat if len(flat) <= self.width else flat[: self.width - 3] + "..."

    def _keep(self, trainer: pl.Trainer, records: list[dict[str, Any]]) -> None:
        table = "| prompt | completion | kl |\n|---|---|---|\n" + "".join(
            f"| {self._short(r['prompt'])} | {self._short(r['completion'])} | {r['reverse_kl']} |\n" for r in records
        )
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):  # TensorBoard
                writer.add_text("rollout/samples", table, records[0]["step"])
            elif hasattr(logger, "log_table"):  # Weights & Biases and others
                columns = ["prompt", "completion", "reverse_kl"]
                logger.log_table("rollout/samples", columns=columns, data=[[r[c] for c in columns] for r in records])
        try:
            with (Path(trainer.default_root_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        except OSError as error:
            rank_zero_warn(f"samples were not written: {error}")
