"""What a policy gradient would do with the signal of drawn tokens, as torchmetrics.

Each takes the log-probabilities (N, V) of both models at N tokens, and the drawn tokens (N,). `AgreementMonitor` logs reach and
leak from the statistics of the training step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from opd_lightning.metrics.token_mean import TokenMean
from opd_lightning.ops.logprobs import gather
from opd_lightning.ops.reach import reach


class TeacherReach(TokenMean):
    """Probability that one of the two laws puts on what the teacher likes more than the student does.

    Args:
        who: whose probability; teacher minus student is the total variation.
    """

    def __init__(self, who: Literal["student", "teacher"] = "student", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if who not in ("student", "teacher"):
            raise ValueError(f"TeacherReach(who={who!r}): allowed are 'student' and 'teacher'")
        self.who = who

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        any_token = student.new_zeros(len(student)).long()
        super().update(getattr(reach(student, teacher, student.exp(), teacher.exp(), any_token), self.who))


class SuppressionLeak(TokenMean):
    """Of the probability that a plain policy gradient takes from suppressed drawn tokens, the share that goes to tokens that
    the teacher rejects too: high means that a route (`CounterfactualRoute`) has something to do.
    """

    def update(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> None:  # type: ignore[override]
        found = reach(student, teacher, student.exp(), teacher.exp(), tokens).leak
        super().update(found.where(gather(teacher, tokens) < gather(student, tokens), torch.nan))


class AscentShare(TokenMean):
    """Share of drawn tokens whose own plain policy-gradient step ``r_a (e_a - p)`` in the logits raises the reverse KL of their
    state, to first order. The mean step lowers it; this is what the noise of one sample costs.
    """

    def update(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> None:  # type: ignore[override]
        probs, signal = student.exp(), teacher - student
        excess = -signal - (probs * -signal).sum(-1, keepdim=True)  # log p - log q, less its mean
        slope = probs * excess  # of the reverse KL in the logits
        change = gather(signal, tokens) * (gather(slope, tokens) - (slope * probs).sum(-1))
        super().update((change > 0.0).to(student.dtype))
