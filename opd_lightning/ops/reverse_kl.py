"""The reverse KL on the whole vocabulary in bfloat16, by a C function (`reverse_kl.c`), on processors with AVX512-BF16.

The products of a loss on such a processor take less time than the passes that PyTorch makes between them. The function is built
once, with the C compiler of the machine; elsewhere PyTorch does the same.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.compiling import FLOAT, INT, LONG, POINTER, built

SOURCE = Path(__file__).with_name("reverse_kl.c")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "fma")


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
    """Of ``sum(factors * value)`` with respect to the student's logits, in bfloat16."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The function, built at the first call on this machine; None where that cannot be done."""
    here = sys.platform == "linux" and platform.machine() == "x86_64" and torch.cpu._is_avx512_bf16_supported()
    found = built(SOURCE, FEATURES) if here else None
    if found is not None:
        given: list[Any] = [POINTER, LONG, POINTER, LONG, LONG, LONG, FLOAT, *[POINTER] * 4, INT]
        found.opd_reverse_kl.argtypes, found.opd_reverse_kl.restype = given, None
    return found


def compared(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"],
    tokens: Int[Tensor, " n"],
    factors: Float[Tensor, " n"],
    temperature: float = 1.0,
) -> Compared | None:
    """The reverse KL of ``logits / temperature``, its gradient and what is measured of both laws; computed in float32.

    Args:
        student: logits.
        teacher: logits.
        tokens: those that were drawn.
        factors: of the values' gradient.
        temperature: of both laws.

    Returns:
        None where the C function does not compute it: it takes bfloat16 logits on a CPU.
    """
    laws = student, teacher
    if any(x.dtype != torch.bfloat16 or not x.is_cpu or x.stride(-1) != 1 for x in laws) or student.shape != teacher.shape:
        return None
    if (found := library()) is None:
        return None
    rows, size = student.shape
    gradient, out = student.new_empty(rows, size), student.new_empty(5, rows, dtype=torch.float32)
    tokens, factors = tokens.contiguous(), factors.float().contiguous()
    places = [x for law in laws for x in (law.data_ptr(), law.stride(0))]
    given = tokens.data_ptr(), factors.data_ptr(), gradient.data_ptr(), out.data_ptr()
    found.opd_reverse_kl(*places, rows, size, 1.0 / temperature, *given, torch.get_num_threads())
    value, logprob, teacher_logprob, student_entropy, teacher_entropy = out
    return Compared(value, logprob, teacher_logprob, student_entropy, teacher_entropy, gradient)
