"""The supports of "Rethinking On-Policy Distillation" (arXiv 2604.13016) in the form of its released code."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.supports import Scores, Support, TopK
from opd_lightning.ops.logprobs import membership

Part = Literal["student", "teacher", "union", "overlap", "non_overlap"]


class ListedTokens(Support):
    """Tokens of the two top-k sets, each pushed by its own log-ratio with a fixed weight.

    The gradient is ``sum_v w_v (log p_v - log q_v) grad log p_v`` with weights held fixed: p_v as it is, or divided by its sum
    over the set. The published code divides for every set but ``non_overlap``, which makes that one weaker by a factor of up
    to a hundred; ``normalized`` sets both apart.

    Args:
        k: size of the two sets.
        part: which tokens: of the student's set, the teacher's, both together, in both, or in exactly one.
        normalized: weights sum to 1.

    Raises:
        ValueError: for an unknown part, or k < 1.
    """

    def __init__(self, k: int, part: Part = "student", normalized: bool = True) -> None:
        if k < 1 or part not in get_args(Part):
            raise ValueError(f"ListedTokens(k={k}, part={part!r}): k at least 1, part one of {', '.join(get_args(Part))}")
        self.k, self.part, self.normalized = k, part, normalized

    @property
    def title(self) -> str:
        return f"{self.part.replace('_', '-')} of the top-{self.k}, {'normalized' if self.normalized else 'raw'} weights"

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        assert teacher is not None
        ids, counts = self._ids(student.detach(), teacher)
        ours = student.gather(-1, ids)
        with torch.no_grad():
            weight = ours.exp().where(counts, 0.0)
            if self.normalized:
                weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
            push = weight * (ours - teacher.gather(-1, ids))
            value = push.sum(-1)
        direct = value + (push * (ours - ours.detach())).sum(-1)
        return Scores(direct=direct, reward=None, cost=value)

    def _ids(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        vocab = student.shape[-1]
        k = min(self.k, vocab)
        mine, theirs = (law.topk(k, -1).indices for law in (student, teacher))
        everything = torch.ones_like(mine, dtype=torch.bool)
        if self.part in ("student", "teacher"):
            return (mine if self.part == "student" else theirs), everything
        shared, known = membership(mine, theirs, vocab), membership(theirs, mine, vocab)
        if self.part == "overlap":
            return mine, shared
        first = everything if self.part == "union" else ~shared
        return torch.cat([mine, theirs], -1), torch.cat([first, ~known], -1)


def equation_5(k: int) -> TopK:
    """The paper's equation 5: both laws renormalised on the student's top-k."""
    return TopK(k, "student", "renormalize")
