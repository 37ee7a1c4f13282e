"""What is measured of the two models at every token, whatever is descended."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.objectives.divergences import ReverseKL
from opd_lightning.objectives.supports import TopK
from opd_lightning.ops.agreement import Agreement, Tops, agreement
from opd_lightning.ops.estimators import k1, k3
from opd_lightning.ops.reach import Reach, reach
from opd_lightning.ops.reverse_kl import Compared


def statistics(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"],
    student_probs: Float[Tensor, "n V"],
    teacher_probs: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    agreement_k: int,
    reverse_kl: Float[Tensor, " n"] | None = None,
    known: int | None = None,
) -> dict[str, Tensor]:
    """Measurements of the two models, whatever is descended. (n,) each, in nats where nothing is said.

    Of a teacher whose laws are ``known`` in part, only what follows from that part. What follows from the log-probabilities of
    the drawn tokens alone is left to `of_drawn`. The probabilities are overwritten: on a CPU, a fresh tensor of this size takes
    longer than the product.
    """
    out: dict[str, Tensor] = {}
    if known is not None:
        out["coarse_reverse_kl"] = ReverseKL().total(*TopK(known, "teacher", "tail").closed(student, teacher)[2:])
    else:
        exact = torch.linalg.vecdot(student_probs, student - teacher) if reverse_kl is None else reverse_kl
        out["reverse_kl"] = exact
    if 0 < agreement_k <= (known or agreement_k):
        out |= _of_tops(agreement(student, teacher, agreement_k))
        if known is None:
            out |= _of_reach(reach(student, teacher, student_probs, teacher_probs, tokens))
    out["student_entropy"] = student_probs.mul_(student).sum(-1).neg_()
    if known is None:
        out["teacher_entropy"] = teacher_probs.mul_(teacher).sum(-1).neg_()
    return out


def of_compared(found: Compared, tops: Tops | None, temperature: float) -> dict[str, Tensor]:
    """`statistics` of laws that a C function has compared, with their likeliest tokens' logits if agreement is measured."""
    out = {"reverse_kl": found.value, "student_entropy": found.student_entropy, "teacher_entropy": found.teacher_entropy}
    if tops is not None and found.more is not None:
        tops = tops.normalized(temperature, found.more.normalizer, found.more.teacher_normalizer)
        out |= _of_tops(tops.agreement()) | _of_reach(found.more.reach)
    return out


def _of_tops(found: Agreement) -> dict[str, Tensor]:
    return {
        **{"overlap": found.overlap, "overlap_advantage": found.advantage},
        **{"student_overlap_mass": found.student_mass, "teacher_overlap_mass": found.teacher_mass},
        **{"student_top_mass": found.student_top_mass, "teacher_top_mass": found.teacher_top_mass},
    }


def _of_reach(found: Reach) -> dict[str, Tensor]:
    return {"student_reach": found.student, "teacher_reach": found.teacher, "leak": found.leak}


def of_drawn(student: Float[Tensor, " n"], teacher: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Estimators of the reverse KL from the log-probabilities of the drawn tokens."""
    return {"k1": k1(student, teacher), "k3": k3(student, teacher)}
