"""What stands between the products of a decoder's layer (norms, gates, rotary positions), by C functions (`pointwise.c`), on
x86-64 processors with vectors of eight numbers and more.

PyTorch makes four to eight passes over the numbers for each and keeps tables in float32 for the backward pass; here each is one
pass, and what is kept is the input. The functions are built once, with the C compiler of the machine.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.compiling import FLOAT, INT, LONG, POINTER, built, vectors

SOURCE = Path(__file__).with_name("pointwise.c")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions, built at the first call on this machine; None where that cannot be done."""
    found = built(SOURCE, vectors())
    if found is not None:
        for name, given in (
            ("opd_norm", [POINTER, POINTER, LONG, LONG, FLOAT, INT, POINTER, POINTER, INT]),
            ("opd_norm_back", [*[POINTER] * 4, LONG, LONG, INT, POINTER, POINTER, INT]),
            ("opd_gate", [POINTER, POINTER, LONG, INT, POINTER, INT]),
            ("opd_gate_back", [POINTER, POINTER, POINTER, LONG, INT, POINTER, POINTER, INT]),
            ("opd_rotate", [POINTER, POINTER, POINTER, LONG, LONG, LONG, INT, INT, POINTER, INT]),
        ):
            function = getattr(found, name)
            function.argtypes, function.restype = given, None
    return found


def computes(*tensors: Tensor) -> bool:
    """Whether the functions take these: all bfloat16 or all float32, on a CPU."""
    kind = tensors[0].dtype
    fit = kind in (torch.bfloat16, torch.float32) and all(x.is_cpu and x.dtype == kind for x in tensors)
    return fit and library() is not None


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """``weight * x / sqrt(mean(x ** 2) + eps)``, both factors rounded to the dtype (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: input of which `computes` is true, with the weight.
        weight: of the norm.
        eps: added to the mean.
    """
    normal: Tensor = _Norm.apply(x, weight, eps)
    return normal


def gated(gate: Float[Tensor, ...], up: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """``silu(gate) * up``, the first factor rounded to the dtype (Shazeer 2020, arXiv 2002.05202)."""
    product: Tensor = _Gate.apply(gate, up)
    return product


def rotated(x: Float[Tensor, "1 M heads d"], cos: Float[Tensor, "1 M d"], sin: Float[Tensor, "1 M d"]) -> Float[Tensor, ...]:
    """``x cos + turned(x) sin``, where turned(x) is minus the second half of a head and then the first (Su et al. 2021, arXiv
    2104.09864, in the order of halves that transformers keeps).
    """
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


def _call(name: str, *given: Any) -> None:
    """Call a function with tensors by their address, their kind and the number of threads."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
    getattr(library(), name)(*plain, torch.get_num_threads())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        count, width = x.numel() // x.shape[-1], x.shape[-1]
        y, scales = torch.empty_like(x), torch.empty(count, dtype=torch.float32)
        _call("opd_norm", x, weight, count, width, eps, x.dtype == torch.bfloat16, y, scales)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, scales = ctx.saved_tensors
        gradient, of_x = gradient.contiguous(), torch.empty_like(x)
        width, half = x.shape[-1], x.dtype == torch.bfloat16
        shape = torch.get_num_threads(), width
        sums = torch.zeros(shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _call("opd_norm_back", x, weight, scales, gradient, len(scales), width, half, of_x, sums)
        return of_x, None if sums is None else sums.sum(0).to(weight.dtype), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(up)
        _call("opd_gate", gate, up, up.numel(), up.dtype == torch.bfloat16, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        half = up.dtype == torch.bfloat16
        _call("opd_gate_back", gate, up, gradient.contiguous(), up.numel(), half, of_gate, of_up)
        return of_gate, of_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    _call("opd_rotate", x, cos, sin, *x.shape[1:], x.dtype == torch.bfloat16, back, y)
    return y
