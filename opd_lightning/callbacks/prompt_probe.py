"""What a selector must know of the prompts before training: the student writes behind each, and is graded or scored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks.pairing import refuse_incomparable
from opd_lightning.callbacks.writing import RunWriters
from opd_lightning.models.distributions import evaluating
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Completion, Prompt

REVERSE_KL = Objective(ReverseKL())


def probe(trainer: pl.Trainer, pl_module: Any, data: Any, sampler: NativeSampler, seed: int) -> list[float]:
    """The score of every training prompt, as `Selector.score` names it. All ranks must call it.

    Raises:
        ValueError: for grades without a grader, or scores of a teacher that has no network.
    """
    kind, n, prompts = data.selector.score, data.selector.probe_samples, data.train_prompts
    if kind == "grade" and data.grader is None:
        raise ValueError(f"data.selector {data.selector!r} needs a prompt set with a grader (a task)")
    if kind != "grade" and not pl_module.teacher.answers:
        raise ValueError(f"data.selector {data.selector!r} asks the teacher, but {pl_module.teacher!r} has no network")
    if kind != "grade":
        refuse_incomparable(pl_module.teacher, "data.selector")
    world, rank = parallel.world_size(), parallel.rank()
    places = [place * world + rank for place in range(-(-len(prompts) // world))]  # equally many on every rank
    mine = [replace(prompts[i % len(prompts)], row=i * n + s if i < len(prompts) else -1) for i in places for s in range(n)]
    written = RunWriters(trainer, pl_module, sampler, seed, "probe").student(mine)
    if kind == "grade":
        scores = data.grades(mine, written, data.grader)
    else:
        scores = _asked(trainer, pl_module, data.inform(mine, written, n), written, data.micro_batch_size or 16, kind)
    everything: dict[int, float] = {}
    for part in parallel.gather_objects({p.row: score for p, score in zip(mine, scores, strict=True) if p.row >= 0}):
        everything |= part
    return [sum(everything[i * n + s] for s in range(n)) / n for i in range(len(prompts))]


def _asked(
    trainer: pl.Trainer, pl_module: Any, prompts: list[Prompt], written: list[Completion], rows: int, kind: str
) -> list[float]:
    """A score a completion, the mean over its tokens."""
    out: list[float] = []
    k = max(1, min(16, pl_module.vocabulary.size // 5))
    with torch.no_grad(), evaluating(pl_module.student), trainer.precision_plugin.forward_context():
        for start in range(0, len(prompts), rows):
            rollout = pl_module.join(prompts[start : start + rows], written[start : start + rows])
            stats = pl_module.score(rollout.to(pl_module.device), REVERSE_KL, k).stats.values
            if kind == "likelihood":  # of the student as it was drawn from, less what the teacher gives less
                values = rollout.sampler_logprobs[rollout.mask] - stats["k1"].cpu()
            else:
                values = stats["student_overlap_mass" if kind == "mass" else "reverse_kl"].cpu()
            of_row = values.double().split(rollout.mask.sum(1).tolist())
            out += [float(v.mean()) if len(v) else 0.0 for v in of_row]
    return out
