"""Builds a zoo pair by running its shipped configurations, and writes the cards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from opd_lightning import configfiles
from opd_lightning.models.loading import ZOO, zoo_models
from opd_lightning.models.students import Student

WHO = ("teacher", "student")
CARD = """# {name}

{summary}

| | |
|---|---|
| parameters | {parameters:,} |
| architecture | Llama, {layers} layers, width {hidden}, tied embeddings, character tokenizer of {vocab} ids |
| stored as | float16 safetensors, {kilobytes:.0f} kB |
| held-out accuracy, sampled at temperature 1 | {accuracy:.1f} % of {count} prompts |
| training | {steps} steps, {sequences:,} written solutions |
| license | Apache-2.0, like the package; trained on generated text only |

Rebuild it with `opd zoo build {task}`; the recipe is `{recipe}`.
Another machine or number of threads rounds differently and gives slightly other weights.
"""


def tasks() -> list[str]:
    """Tasks whose pair can be built."""
    return sorted({name.removeprefix("zoo/").rpartition("_")[0] for name in configfiles.shipped() if name.startswith("zoo/")})


def build(task: str, out: str | None = None, runs: str = "runs/zoo") -> None:
    """Train teacher and student of a task from their shipped configurations and store them with their cards.

    Args:
        task: name of the pair, e.g. addition.
        out: folder for the pair; the package's own zoo if left out.
        runs: folder for the training runs.
    """
    if task not in tasks():
        raise ValueError(f"no zoo recipe for {task!r}; there are {', '.join(tasks())}")
    for who in WHO:
        recipe, run = f"zoo/{task}_{who}.yaml", Path(runs) / task / who
        _opd("fit", "-c", recipe, "--trainer.default_root_dir", str(run))
        target = Path(out) / who if out else ZOO / task / who
        _store(recipe, run, target)
        print(f"{who}: {target}")


def _opd(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "opd_lightning", *words], check=True)


def _store(recipe: str, run: Path, target: Path) -> None:
    """The final student of a run as float16, with a card that states what the stored weights achieve."""
    from opd_lightning.callbacks.recovery import last_checkpoint
    from opd_lightning.module import OPDModule

    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"the run in {run} left no checkpoint")
    module = OPDModule.load_from_checkpoint(checkpoint, map_location="cpu")
    student: Any = module.student
    student.to(torch.float16).save_pretrained(target)
    module.vocabulary.tokenizer.save_pretrained(target)
    config = configfiles.carried(checkpoint)
    measured = run / "stored"
    student_now = ["--model.student", "Student", "--model.student.path", str(target)]
    _opd("validate", "-c", recipe, *student_now, "--trainer.default_root_dir", str(measured))
    history = json.loads((measured / "eval" / "history.json").read_text(encoding="utf-8"))
    stored = Student(str(target)).build()
    card = CARD.format(
        name=f"zoo/{target.parent.name}/{target.name}",
        summary=configfiles.summary(configfiles.find(recipe)),
        parameters=sum(p.numel() for p in stored.parameters()),
        layers=student.config.num_hidden_layers,
        hidden=student.config.hidden_size,
        vocab=student.config.vocab_size,
        kilobytes=sum(f.stat().st_size for f in target.iterdir()) / 1024,
        accuracy=100 * history[-1]["accuracy"],
        count=config["data"]["held_out_prompts"]["init_args"]["size"],
        steps=config["trainer"]["max_steps"],
        sequences=config["trainer"]["max_steps"] * config["data"]["batch_size"],
        task=target.parent.name,
        recipe=f"configs/{recipe}",
    )
    (target / "README.md").write_text(card, encoding="utf-8")


def show() -> None:
    """List the bundled models, one line each."""
    for name in zoo_models():
        card = ZOO / name.removeprefix("zoo/") / "README.md"
        lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
        accuracy = next((line.split("|")[2].strip() for line in lines if line.startswith("| held-out accuracy")), "no card")
        print(f"{name.ljust(28)} {accuracy}")
    print(f"\nrecipes: {', '.join(tasks())} (opd zoo build NAME)")
