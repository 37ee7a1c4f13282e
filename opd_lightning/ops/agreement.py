"""How far two next-token laws agree: the quantities that tell a run that will succeed from one that will not.

Definitions after "Rethinking On-Policy Distillation" (arXiv 2604.13016, equations 6 to 10), on student states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.ops.logprobs import floor_of, membership, top_k


class Agreement(NamedTuple):
    """Per-token agreement of the two top-k sets, whose overlap is ``I``; all of shape (N,)."""

    overlap: Float[Tensor, " N"]
    """``|I| / k``, in [0, 1]."""
    student_mass: Float[Tensor, " N"]
    """Student probability on ``I``."""
    teacher_mass: Float[Tensor, " N"]
    """Teacher probability on ``I``."""
    advantage: Float[Tensor, " N"]
    """Mean over ``I`` of ``p (log q - log p)``, both renormalised on ``I``: never positive, 0 when they agree. 0 where
    ``I`` is empty (the overlap of 0 says so)."""
    student_top_mass: Float[Tensor, " N"]
    """Student probability on the student's own top-k: drained by a truncated divergence that is not closed."""
    teacher_top_mass: Float[Tensor, " N"]
    """Teacher probability on the teacher's own top-k."""


def agreement(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], k: int) -> Agreement:
    """Overlap of the two top-k sets, the mass that each law puts there, and the overlap-token advantage.

    Args:
        student: log-probabilities of the student.
        teacher: log-probabilities of the teacher.
        k: size of both sets; more than V means V.

    >>> laws = torch.tensor([[0.6, 0.3, 0.1]]).log()
    >>> agreement(laws, laws, k=2).overlap.item()
    1.0
    """
    return Tops.of(student, teacher, k).agreement()


class Tops(NamedTuple):
    """The likeliest tokens of two laws, from logits or log-probabilities."""

    ours: Float[Tensor, "N K"]
    """The student's numbers at its likeliest tokens, largest first."""
    ids: Int[Tensor, "N K"]
    """Those tokens."""
    crossed: Float[Tensor, "N K"]
    """The teacher's numbers at them."""
    theirs: Float[Tensor, "N K"]
    """The teacher's numbers at its own."""
    their_ids: Int[Tensor, "N K"]
    """Those tokens."""
    vocab: int

    @classmethod
    def of(cls, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], k: int) -> Tops:
        """Of each its k likeliest; more than V means V."""
        vocab = student.shape[-1]
        (ours, ids), (theirs, their_ids) = (top_k(law, min(k, vocab)) for law in (student, teacher))
        return cls(ours, ids, teacher.gather(-1, ids), theirs, their_ids, vocab)

    def normalized(self, temperature: float, normalizer: Float[Tensor, " N"], teacher_normalizer: Float[Tensor, " N"]) -> Tops:
        """Log-probabilities from logits, in the normalizers' precision: ``logits / temperature - normalizer``."""

        def law(logits: Tensor, less: Tensor) -> Tensor:
            return (logits.to(less.dtype) / temperature - less[:, None]).clamp(floor_of(less.dtype), 0.0)

        crossed, theirs = (law(x, teacher_normalizer) for x in (self.crossed, self.theirs))
        return self._replace(ours=law(self.ours, normalizer), crossed=crossed, theirs=theirs)

    def agreement(self) -> Agreement:
        """Of log-probabilities."""
        shared = membership(self.ids, self.their_ids, self.vocab)
        size, k = shared.sum(-1), self.ids.shape[-1]
        floor = torch.finfo(self.ours.dtype).min
        s, t = (x.masked_fill(~shared, floor) for x in (self.ours, self.crossed))
        log_p = s - s.logsumexp(-1, keepdim=True)
        log_q = t - t.logsumexp(-1, keepdim=True)
        terms = (log_p.exp() * (log_q - log_p)).where(shared, s.new_zeros(()))
        return Agreement(
            overlap=size.to(s.dtype) / k,
            student_mass=s.exp().sum(-1),
            teacher_mass=t.exp().sum(-1),
            advantage=terms.sum(-1) / size.clamp(min=1),
            student_top_mass=self.ours.exp().sum(-1),
            teacher_top_mass=self.theirs.exp().sum(-1),
        )
