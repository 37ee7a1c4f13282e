"""``opd doctor --cost``: what a step will take, from the configuration and a second of measuring the machine.

The forecast counts matrix products (2 operations per weight and token, twice that again in the backward pass) and bytes that
decoding must read, and divides them by the speed of this machine's own matrix product and memory. It is a lower bound made of
what cannot be avoided, times one factor for everything else; measuring three steps beside it shows how good it is.
"""

from __future__ import annotations

import csv
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_lightning.inspect import subrun
from opd_lightning.inspect.setups import Setup
from opd_lightning.models.loading import hollow_model
from opd_lightning.models.lora import add_lora
from opd_lightning.models.students import Student, prune_layers
from opd_lightning.models.teachers import AdapterOffTeacher, FrozenTeacher, FunctionTeacher, LiveTeacher, ServerTeacher
from opd_lightning.ops.fused import tokens_at_once
from opd_lightning.samplers import compiled, stepped

PHASES = ("rollout", "student forward", "teacher forward", "heads and loss", "backward", "optimizer")
SAMPLE = 64
"""Prompts whose lengths are read."""
OVERHEAD = {"rollout": 2.0, "compiled rollout": 1.25, "heads and loss": 3.0}
"""How far above the bound a phase runs; measured once on a CPU pair of 135 and 81 million parameters. Other phases: 1.6."""
LAYER_SECONDS = 1.2e-4
"""What launching the operations of one decoder layer takes at least, whatever their size."""
PROCESS = 600 * 2**20
"""Resident memory of an interpreter with the libraries loaded, bytes."""


@dataclass(frozen=True)
class Machine:
    """Speed of the device that a run would use.

    Attributes:
        name: ``cpu`` or ``cuda``.
        products: operations per second of a matrix product, by weight dtype.
        bandwidth: bytes read and written per second.
    """

    name: str
    products: dict[torch.dtype, float]
    bandwidth: float

    @classmethod
    def measured(cls, dtypes: set[torch.dtype]) -> Machine:
        """A second of multiplying and copying."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        size = 4096 if device.type == "cuda" else 1024
        products = {}
        for dtype in dtypes:
            a = torch.ones(size, size, dtype=dtype, device=device)
            products[dtype] = 2 * size**3 / _seconds(lambda a=a: a @ a, device)  # type: ignore[misc]
        block = torch.ones(2**26, device=device)
        copied = block.clone()  # into fresh memory a CPU would be timed clearing pages
        return cls(device.type, products, 2 * block.nbytes / _seconds(lambda: copied.copy_(block), device))


def _seconds(work: Any, device: torch.device) -> float:
    work()
    took = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Counts are parameters.

    Attributes:
        layers: decoder layers.
        body: in the decoder layers, adapters included.
        head: in the output head.
        total: all, shared ones once.
        trained: with a gradient.
        head_trained: whether the head has a gradient.
        width, inner, cached: of a layer's stream, its feed-forward part, and what its cache keeps of a token.
        dtype: of the weights.
    """

    layers: int
    body: int
    head: int
    total: int
    trained: int
    head_trained: bool
    width: int
    inner: int
    cached: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: str, recipe: Student | None = None) -> Shape:
        """Read from the configuration of a model; its weights are not loaded."""
        model: Any = hollow_model(config)
        if recipe is not None and recipe.keep_layers is not None:
            prune_layers(model, recipe.keep_layers)
        layers = len(model.get_decoder().layers)
        head: nn.Parameter = model.get_output_embeddings().weight
        if recipe is not None and recipe.lora is not None:
            with torch.device("meta"):
                model = add_lora(model, recipe.lora, recipe.seed)
        elif recipe is None:
            model.requires_grad_(False)
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        body = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
        return cls(
            layers=layers,
            body=body,
            head=head.numel(),
            total=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            head_trained=head.requires_grad,
            width=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            cached=2 * heads * size,
            dtype=getattr(torch, dtype),
        )

    @property
    def bytes(self) -> int:
        return self.total * self.dtype.itemsize


@dataclass(frozen=True)
class Load:
    """What an optimizer step works on, one process: rollouts, tokens of a prompt and of a completion, sizes of batches."""

    rollouts: int
    prompt: float
    completion: int
    micro_batch: int
    decoded_together: int
    every_n_steps: int
    passes: int
    compiled: bool = False  # whether the sampler's C functions write


def load_of(setup: Setup) -> Load:
    """The work of a step, with completions as long as the sampler lets them be."""
    data, tokenizer = setup.data, setup.module.vocabulary.tokenizer
    lengths = [len(ids) for ids in data.template.ids(data.prompt_set.rows()[:SAMPLE], tokenizer)]
    sampler = setup.rollout.sampler
    return Load(
        rollouts=data.batch_size,
        prompt=sum(lengths) / len(lengths),
        completion=sampler.max_new_tokens,
        micro_batch=data.micro_batch_size or data.batch_size,
        decoded_together=min(sampler.batch_size, data.batch_size * setup.rollout.every_n_steps),
        every_n_steps=setup.rollout.every_n_steps,
        passes=setup.rollout.passes,
        compiled=getattr(sampler, "engine", "") == "auto" and _functions(setup.module.recipe.dtype) is not None,
    )


def _functions(dtype: str) -> object | None:
    return {"bfloat16": compiled.library, "float32": stepped.library}.get(dtype, lambda: None)()


def teachers_of(setup: Setup, student: Shape) -> list[tuple[Shape, bool]]:
    """The networks that answer, and whether each has weights of its own beside the student's."""
    if not setup.module.objective.needs_teacher:
        return []
    found = []
    for leaf in setup.module.teacher.leaves().values():
        if isinstance(leaf, FrozenTeacher):
            found.append((Shape.of(leaf.config(), leaf.dtype), True))
        elif leaf.answers and not isinstance(leaf, (FunctionTeacher, ServerTeacher)):
            found.append((student, not isinstance(leaf, (AdapterOffTeacher, LiveTeacher))))
    return found


def forecast(student: Shape, teachers: Sequence[Shape], load: Load, machine: Machine, checkpointing: bool) -> dict[str, float]:
    """Seconds of an optimizer step by phase."""
    tokens = load.rollouts * (load.prompt + load.completion)
    written = load.rollouts * load.completion
    speed = machine.products[student.dtype]
    batches = load.rollouts / load.decoded_together
    reading = (student.body + student.head) * student.dtype.itemsize / machine.bandwidth
    together = load.decoded_together
    computing = 2 * (student.body + student.head) * together / speed
    step = max(reading + student.layers * LAYER_SECONDS, computing)
    found = {
        "rollout": (batches * load.completion * step + 2 * student.body * load.rollouts * load.prompt / speed) / load.passes,
        "student forward": 2 * student.body * tokens / speed + student.layers * LAYER_SECONDS,
        "heads and loss": (4 + 2 * student.head_trained) * student.head * written / speed,
        "backward": (4 + 2 * checkpointing) * student.body * tokens / speed + 2 * student.layers * LAYER_SECONDS,
        "optimizer": 7 * student.trained * student.dtype.itemsize / machine.bandwidth,
    }
    for teacher in teachers:
        of_teacher = machine.products[teacher.dtype]
        took = 2 * teacher.body * tokens / of_teacher + teacher.layers * LAYER_SECONDS
        found["teacher forward"] = found.get("teacher forward", 0.0) + took
        found["heads and loss"] += 2 * teacher.head * written / of_teacher
    above = {**OVERHEAD, "rollout": OVERHEAD["compiled rollout" if load.compiled else "rollout"]}
    return {name: found[name] * above.get(name, 1.6) for name in PHASES if name in found}


def memory(student: Shape, teachers: Sequence[Shape], load: Load, machine: Machine, checkpointing: bool) -> dict[str, float]:
    """Bytes at the peak of a step by owner."""
    tokens = load.micro_batch * (load.prompt + load.completion)
    size = student.dtype.itemsize
    kept = student.width if checkpointing else 9 * student.width + 4 * student.inner + 2 * student.cached
    scored = load.micro_batch * load.completion
    one_layer = (9 * student.width + 4 * student.inner) if checkpointing else 0
    found = {
        "student": float(student.bytes),
        "teacher": float(sum(t.bytes for t in teachers)),
        "gradients": float(student.trained * size),
        "optimizer": 2.0 * student.trained * size,
        "activations": tokens * (student.layers * kept + one_layer) * size,
        "loss": _of_loss(scored, student),
        "cache of the sampler": load.decoded_together
        * (load.prompt + load.completion)
        * student.layers
        * student.cached
        * size,
    }
    if machine.name == "cpu":
        found["process"] = float(PROCESS)
    return {name: value for name, value in found.items() if value}


def _of_loss(tokens: int, student: Shape) -> float:
    """The teacher's tile of logits, the student's logits or their gradients, and the sum of a trained head's gradient."""
    vocab = student.head // student.width
    tile, gathered = tokens_at_once(tokens, vocab, student.dtype, student.head_trained)
    logits = float(vocab * (tile + gathered) * student.dtype.itemsize)
    return logits + (student.head * 4.0 if student.head_trained and gathered < tokens else 0.0)


def measure(words: Sequence[str]) -> tuple[dict[str, float], float]:
    """Seconds by phase of steps 2 and 3 of a real fit, and its peak memory in bytes (resident; the process alone)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"max_steps": 3, "default_root_dir": folder, "enable_checkpointing": "false", "enable_progress_bar": "false"}
        given = [*words, *(w for k, v in flags.items() for w in (f"--trainer.{k}", str(v)))]
        given += ["--trainer.logger", "true", "--eval.every_n_steps", "0", "--data.held_out_prompts", "null"]
        given += ["--data.held_out", "0", "--report.controls", "{}"]
        done = subprocess.run(subrun.command(given), env=subrun.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the run of three steps failed:\n{done.stderr.strip()[-2000:]}")
        (log,) = Path(folder).rglob("metrics.csv")
        with log.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/step_seconds")]
    seconds: dict[str, float] = {}
    for row in rows[1:]:
        for key, value in row.items():
            if key.startswith("time/") and value:
                name = key.removeprefix("time/").replace("_", " ")
                seconds[name] = seconds.get(name, 0.0) + float(value) / len(rows[1:])
    return seconds, float(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def table(predicted: dict[str, float], bytes_: dict[str, float], measured: tuple[dict[str, float], float] | None) -> str:
    """Forecast and measurement side by side."""
    seconds, peak = measured if measured is not None else ({}, 0.0)
    lines = [f"{'seconds of a step':22} forecast" + ("  measured" if seconds else "")]
    for name in dict.fromkeys([*predicted, *seconds]):
        there = f"{predicted[name]:8.3f}" if name in predicted else " " * 8
        lines.append(f"{name:22} {there}" + (f"  {seconds.get(name, 0.0):8.3f}" if seconds else ""))
    lines.append(f"{'all':22} {sum(predicted.values()):8.3f}" + (f"  {sum(seconds.values()):8.3f}" if seconds else ""))
    lines += ["", f"{'MiB at the peak':22} forecast" + ("  measured" if peak else "")]
    lines += [f"{name:22} {value / 2**20:8.0f}" for name, value in bytes_.items()]
    lines.append(f"{'all':22} {sum(bytes_.values()) / 2**20:8.0f}" + (f"  {peak / 2**20:8.0f}" if peak else ""))
    return "\n".join(lines)


@dataclass(frozen=True)
class Forecast:
    """What a step will take.

    Attributes:
        load, machine: what is worked on, and where.
        seconds: by phase.
        memory: bytes at the peak by owner.
    """

    load: Load
    machine: Machine
    seconds: dict[str, float]
    memory: dict[str, float]

    @classmethod
    def of(cls, setup: Setup) -> Forecast:
        """From the configuration and a second of measuring the machine; no weights are loaded."""
        recipe = setup.module.recipe
        student = Shape.of(recipe.config(), recipe.dtype, recipe)
        asked = teachers_of(setup, student)
        teachers, owned = [shape for shape, _ in asked], [shape for shape, own in asked if own]
        load = load_of(setup)
        machine = Machine.measured({student.dtype, *(shape.dtype for shape in teachers)})
        checkpointing = recipe.gradient_checkpointing
        seconds = forecast(student, teachers, load, machine, checkpointing)
        return cls(load, machine, seconds, memory(student, owned, load, machine, checkpointing))


def cost(setup: Setup, words: Sequence[str], measuring: bool) -> str:
    """The page of ``opd doctor --cost``."""
    found = Forecast.of(setup)
    load, machine = found.load, found.machine
    head = (
        f"{load.rollouts} rollouts of {load.prompt:.0f} + {load.completion} tokens a step on one {machine.name}: "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s {str(dtype).removeprefix('torch.')}" for dtype, rate in machine.products.items())
        + f", {machine.bandwidth / 1e9:.0f} GB/s"
    )
    measured = measure(words) if measuring else None
    return head + "\n\n" + table(found.seconds, found.memory, measured)
