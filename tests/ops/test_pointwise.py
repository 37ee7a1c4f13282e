"""Norms, gates and rotary positions in C, and their gradients, are as near to float64 as transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from opd_lightning.ops.pointwise import computes, gated, library, rms_norm, rotated

pytestmark = [
    pytest.mark.skipif(library() is None, reason="no processor or no compiler for it"),
    pytest.mark.usefixtures("vectors"),
]

EPS = 1e-3
KINDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""The error that is small in each precision; with few numbers it is a matter of chance who has the smaller one."""


def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = LlamaRMSNorm(len(weight), EPS).to(x.dtype)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def stock_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "norm": (lambda x, w: rms_norm(x, w, EPS), stock_norm, exact_norm),
    "gate": (gated, lambda gate, up: silu(gate) * up, lambda gate, up: silu(gate) * up),
    "rotary": (rotated, stock_turn, stock_turn),
}


def inputs(name: str, size: int) -> tuple[list[Tensor], int]:
    """Numbers in float64 that bfloat16 holds, and how many of them have a gradient."""
    torch.manual_seed(size)
    shapes = {
        "norm": [(3, 5, size), (size,)],
        "gate": [(3, 5, size), (3, 5, size)],
        "rotary": [(1, 7, 3, size), (1, 7, size), (1, 7, size)],
    }[name]
    scale = 3.0 if name == "gate" else 1.0
    found = [(scale * torch.randn(shape)).bfloat16().double() for shape in shapes]
    if name == "gate":
        found[0].view(-1)[:3] = torch.tensor([-200.0, 200.0, -90.0])  # e^-x is beyond float32
    return found, 1 if name == "rotary" else 2


def run(operation: Callable[..., Tensor], given: list[Tensor], learn: int, kind: torch.dtype) -> list[Tensor]:
    """The value, then the gradients."""
    leaves = [x.to(kind).requires_grad_(i < learn) for i, x in enumerate(given)]
    value = operation(*leaves)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).bfloat16().view(value.shape)
    return [x.double() for x in (value.detach(), *torch.autograd.grad(value, leaves[:learn], weight.to(value.dtype)))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 22, 32, 90, 576])
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_near_to_float64_as_transformers(name: str, size: int, kind: torch.dtype) -> None:
    """Sizes that fill no vector, one, and many."""
    given, learn = inputs(name, size)
    ours, stock, exact = OPERATIONS[name]
    assert computes(*(x.to(kind) for x in given))
    expected = run(exact, given, learn, torch.float64)
    for found, theirs, wanted in zip(run(ours, given, learn, kind), run(stock, given, learn, kind), expected, strict=True):
        error, other = (float((x - wanted).norm() / wanted.norm()) for x in (found, theirs))
        assert error <= max(1.2 * other, KINDS[kind] / 3) and error < KINDS[kind]


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    given, _ = inputs(name, 32)
    given[0].view(-1)[40] = torch.nan
    found = OPERATIONS[name][0](*(x.float() for x in given)).flatten()
    assert bool(found.isnan().any()) and not bool(found.isnan().all())


def test_other_precisions_and_mixed_ones_are_left_to_pytorch() -> None:
    one: Any = torch.ones(4)
    assert computes(one, one) and not computes(one.double()) and not computes(one, one.bfloat16()) and not computes(one.half())
