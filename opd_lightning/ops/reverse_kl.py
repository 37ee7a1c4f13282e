"""The reverse KL on the whole vocabulary by a C function (`reverse_kl.c`), on x86-64 processors with vectors of eight numbers
and more.

The passes that PyTorch makes between the products of a loss take a fifth of its time in float32, and in bfloat16 more than the
products. The function is built once, with the C compiler of the machine; elsewhere PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.compiling import INT, POINTER, built, vectors
from opd_lightning.ops.reach import Reach, leak

SOURCE = Path(__file__).with_name("reverse_kl.c")


class Further(NamedTuple):
    """What monitors ask of two laws besides, token by token."""

    reach: Reach
    normalizer: Float[Tensor, " n"]
    """``logsumexp(logits / temperature)`` of the student."""
    teacher_normalizer: Float[Tensor, " n"]
    """The same of the teacher."""


class Compared(NamedTuple):
    """Two laws, token by token, in nats."""

    value: Float[Tensor, " n"]
    """KL(student ‖ teacher)."""
    logprob: Float[Tensor, " n"]
    """The student's log-probability of the drawn token."""
    teacher_logprob: Float[Tensor, " n"]
    student_entropy: Float[Tensor, " n"]
    teacher_entropy: Float[Tensor, " n"]
    gradient: Float[Tensor, "n V"]
    """Of ``sum(factors * value)`` with respect to the student's logits, in their precision."""
    more: Further | None
    """What was asked for besides."""


class _Laws(ctypes.Structure):
    """`Laws` of the C source."""

    _fields_ = (
        *((name, POINTER) for name in ("ours", "theirs", "tokens", "factors", "gradient", "out")),
        *((name, ctypes.c_int64) for name in ("our_step", "their_step", "step", "rows", "size")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The function, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        found.opd_reverse_kl.argtypes, found.opd_reverse_kl.restype = [ctypes.POINTER(_Laws), INT, INT, INT], None
    return found


def computes(student: Tensor, teacher: Tensor) -> bool:
    """Whether the function takes such logits: both float32 or both bfloat16, on a CPU, of one shape and with whole rows."""
    kind, fit = student.dtype, student.shape == teacher.shape
    alike = fit and all(x.dtype == kind and x.is_cpu and x.stride(-1) == 1 for x in (student, teacher))
    return alike and kind in (torch.float32, torch.bfloat16) and library() is not None


def compared(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    factors: Float[Tensor, " n"],
    temperature: float = 1.0,
    room: Float[Tensor, "n V"] | None = None,
    more: bool = False,
) -> Compared:
    """The reverse KL of ``logits / temperature``, its gradient and what is measured of both laws; computed in float32.

    Args:
        student: logits, of which `computes` is true, with the teacher's.
        teacher: logits.
        tokens: those that were drawn.
        factors: of the values' gradient.
        temperature: of both laws.
        room: takes the gradient; may be the student's logits themselves.
        more: whether to sum up what monitors ask for, too.
    """
    found, laws = library(), (student, teacher)
    assert found is not None
    rows, size = student.shape
    gradient, out = (
        student.new_empty(rows, size) if room is None else room,
        torch.empty(10 if more else 5, rows, dtype=torch.float32),
    )
    tokens, factors = tokens.contiguous(), factors.float().contiguous()
    places = (x.data_ptr() for x in (student, teacher, tokens, factors, gradient, out))
    given = _Laws(*places, *(x.stride(0) for x in (*laws, gradient)), rows, size, 1.0 / temperature)
    found.opd_reverse_kl(given, student.dtype == torch.bfloat16, more, torch.get_num_threads())
    value, logprob, teacher_logprob, student_entropy, teacher_entropy, *rest = out
    further = None
    if rest:
        liked, likes, rejected, *normalizers = rest
        further = Further(Reach(liked, likes, leak(rejected, logprob, teacher_logprob)), *normalizers)
    return Compared(value, logprob, teacher_logprob, student_entropy, teacher_entropy, gradient, further)
