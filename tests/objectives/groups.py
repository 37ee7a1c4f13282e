"""Groups of completions of one prompt, drawn independently, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from opd_lightning.inspect.oracle import Path, TableLaws, TabularWorld, Writer
from opd_lightning.objectives import Extras, Objective
from opd_lightning.types import Rollout

Group = tuple[Path, ...]


def gradients(
    at: TabularWorld, groups: Sequence[Group], objective: Objective, writer: Writer = "student", **extras: object
) -> torch.Tensor:
    """(groups, G, S, V) gradient of every rollout of every group, in one batch."""
    paths, size = [path for group in groups for path in group], len(groups[0])
    batch = Rollout.cat([at.rollout(path, writer) for path in paths])
    batch = replace(batch, row=torch.arange(len(paths)), group_size=size, scale=(1.0,) * len(objective.flat()))
    states = torch.tensor([s for path in paths for s in path.states])
    owner = torch.tensor([i for i, path in enumerate(paths) for _ in path.states])
    rows = at.student.detach()[states].requires_grad_(True)
    loss = objective(TableLaws(rows), TableLaws(at.teacher[states]), batch, extras=Extras(**extras)).loss
    out = torch.zeros(len(paths), *at.teacher.shape, dtype=torch.float64)
    out.index_put_((owner, states), torch.autograd.grad(loss, rows)[0], accumulate=True)
    return out.view(len(groups), size, *at.teacher.shape)


def mean(groups: Sequence[Group], found: torch.Tensor, writer: Writer = "student") -> torch.Tensor:
    """Expected gradient of a rollout, the rollouts of a group drawn independently."""
    chances = [torch.tensor([path.probability(writer) for path in group], dtype=torch.float64).prod() for group in groups]
    return (torch.stack(chances)[:, None, None] * found.mean(1)).sum(0)
