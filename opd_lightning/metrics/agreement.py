"""Agreement of student and teacher as torchmetrics, over the student's states (arXiv 2604.13016, equations 6 to 10).

Each takes the log-probabilities (N, V) of both at N tokens. `AgreementMonitor` logs the same quantities from the statistics
of the training step, where the vocabulary is already gone.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from opd_lightning.metrics.token_mean import TokenMean
from opd_lightning.ops.agreement import agreement
from opd_lightning.ops.logprobs import entropy


class _OnTopK(TokenMean):
    def __init__(self, k: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"{type(self).__name__}(k={k}): k must be at least 1")
        self.k = k


class TopKOverlap(_OnTopK):
    """Share of the student's k likeliest tokens that are among the teacher's; rises towards 1 in runs that succeed."""

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update(agreement(student, teacher, self.k).overlap)


class TopKMass(_OnTopK):
    """Student probability on the student's own k likeliest tokens: drained by a truncated reverse KL that is not closed."""

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update(agreement(student, teacher, self.k).student_top_mass)


class OverlapMass(_OnTopK):
    """Probability that one of the two laws puts on the shared part of both top-k sets; 0.97 to 0.99 is healthy.

    Args:
        k: size of the sets.
        who: whose probability.
    """

    def __init__(self, k: int = 16, who: Literal["student", "teacher"] = "student", **kwargs: Any) -> None:
        super().__init__(k, **kwargs)
        if who not in ("student", "teacher"):
            raise ValueError(f"OverlapMass(who={who!r}): allowed are 'student' and 'teacher'")
        self.who = who

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        found = agreement(student, teacher, self.k)
        super().update(found.student_mass if self.who == "student" else found.teacher_mass)


class OverlapAdvantage(_OnTopK):
    """Mean advantage of the shared tokens, never positive; rises towards 0. Read it beside the overlap mass: alone it
    misses everything outside the shared part.
    """

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update(agreement(student, teacher, self.k).advantage)


class NegativeShare(TokenMean):
    """Student probability of the tokens that the teacher finds less likely than the student does."""

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update(student.exp().where(teacher < student, 0.0).sum(-1))


class Imbalance(TokenMean):
    """``sum_{r < 0} p |r| - sum_{r > 0} p r`` with r = log q - log p: what is suppressed beyond what is raised. It equals the
    reverse KL, whatever the two laws are, which makes it a check of both.
    """

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        signal = teacher - student
        down, up = (-signal).clamp(min=0.0), signal.clamp(min=0.0)
        super().update((student.exp() * down).sum(-1) - (student.exp() * up).sum(-1))


class EntropyGap(TokenMean):
    """Mean of abs(teacher entropy - student entropy) in nats; falls towards 0."""

    def update(self, student: Tensor, teacher: Tensor) -> None:  # type: ignore[override]
        super().update((entropy(teacher) - entropy(student)).abs())
