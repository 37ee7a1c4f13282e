"""TRL's own trainers, unmodified, stopped between optimizer steps. Runs in the peer's environment.

    --trainer gkd            GKDTrainer with lmbda = 1: every completion is the student's own
    --trainer distillation   DistillationTrainer

Best settings found: weights in the dtype itself instead of autocast, no gradient checkpointing (which would also switch the
key-value cache off while GKDTrainer generates), no padding in the batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from protocol import Clock, answer, orders, peak_rss, versions


class Gate(TrainerCallback):  # type: ignore[misc]
    """Waits for orders between steps; the other half of `gate.Gate`."""

    def __init__(self, student: Any, tokenizer: Any, clock: Clock) -> None:
        self.student, self.tokenizer, self.clock = student, tokenizer, clock
        self.running, self.tokens = False, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        packages = ("trl", "liger-kernel", "torch", "transformers", "accelerate")
        found = self.clock.stop() if self.running else {"versions": versions(*packages)}
        gpu = {"peak_gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        answer(**found, tokens=self.tokens, loss=losses[-1] if losses else float("nan"), peak_rss=peak_rss(), **gpu)
        self.tokens = 0
        for order in orders():
            if order["do"] == "step":
                torch.set_float32_matmul_precision(order.get("matmul", "highest"))
                self.running = True
                self.clock.start()
                return
            if order["do"] == "save":
                self.student.save_pretrained(order["folder"])
                self.tokenizer.save_pretrained(order["folder"])
                answer(folder=order["folder"])
        os._exit(0)  # the other side closed the pipe

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = self.clock.phase("optimizer")
        self.optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.__exit__(None, None, None)


def watched(student: Any, teacher: Any, gate: Gate, prompt_tokens: int) -> None:
    """Phases of the two networks, and how many tokens were written. What runs inside generate belongs to the rollout."""
    generate = student.generate

    @functools.wraps(generate)
    def writing(*args: Any, **kwargs: Any) -> Any:
        with gate.clock.phase("rollout"):
            out = generate(*args, **kwargs)
        ids = out if torch.is_tensor(out) else out.sequences
        gate.tokens += ids.shape[0] * (ids.shape[1] - prompt_tokens)
        return out

    student.generate = writing
    for model, name in ((student, "student"), (teacher, "teacher")):
        gate.clock.wrap(model.model, "forward", name, unless=("rollout",))
        gate.clock.wrap(model.lm_head, "forward", "loss", unless=("rollout",))


def trainer_of(given: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any, data: Dataset, gate: Gate) -> Any:
    """The trainer with its best settings."""
    common: dict[str, Any] = {
        "output_dir": given.scratch,
        "per_device_train_batch_size": given.rows,
        "max_steps": 100_000,
        "learning_rate": given.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": given.beta2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": given.device == "cpu",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": given.seed,
    }
    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer, "callbacks": [gate]}
    if given.trainer == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            same = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
            return {"prompts": ids, "prompt_attention_mask": mask, **same}

        gate.clock.wrap(GKDTrainer, "generalized_jsd_loss", "loss")
        GKDTrainer.generalized_jsd_loss = staticmethod(GKDTrainer.generalized_jsd_loss)
        config = GKDConfig(**common, lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=given.new_tokens, max_length=None)
        trainer = GKDTrainer(args=config, data_collator=collate, train_dataset=data, **models)
        if not given.eos:
            trainer.generation_config.eos_token_id = None
        return trainer
    import trl.trainer.distillation_trainer as file
    from trl import DistillationConfig, DistillationTrainer

    gate.clock.wrap(file, "_chunked_divergence_loss", "loss")
    config = DistillationConfig(**common, beta=1.0, temperature=1.0, max_completion_length=given.new_tokens)
    trainer = DistillationTrainer(args=config, train_dataset=data, **models)
    if not given.eos:
        trainer.generation_config.eos_token_id = None
        trainer.generation_kwargs["eos_token_id"] = None
        trainer.eos_token_ids = [-1]
    return trainer


def main() -> None:
    """Train until the pipe is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainer", choices=["gkd", "distillation"], required=True)
    for name in ("student", "teacher", "prompts", "scratch"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--teacher-dtype", help="of the teacher; --dtype if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eos", action="store_true", help="completions may end")
    given = parser.parse_args()
    student = AutoModelForCausalLM.from_pretrained(given.student, dtype=getattr(torch, given.dtype))
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=getattr(torch, given.teacher_dtype or given.dtype))
    tokenizer = AutoTokenizer.from_pretrained(given.student, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for model in (teacher, student):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        if not given.eos:
            model.generation_config.eos_token_id = None
    rows = [json.loads(line)["full"] for line in Path(given.prompts).read_text().splitlines()]
    on_gpu = given.device != "cpu"
    gate = Gate(student, tokenizer, Clock(torch.cuda.synchronize if on_gpu else lambda: None))
    watched(student, teacher, gate, given.prompt_tokens)
    trainer = trainer_of(given, student, teacher, tokenizer, Dataset.from_dict({"prompt": rows}), gate)
    gate.clock.wrap(trainer.accelerator, "backward", "backward")
    gate.clock.wrap(trainer, "_clip_grad_norm", "optimizer")
    trainer.train()


if __name__ == "__main__":
    main()
