"""Attention in blocks is attention, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opd_lightning.ops import attention
from opd_lightning.ops.attention import CausalAttention


def drawn(length: int, context: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of three rows, as projections leave them, and a gradient."""
    torch.manual_seed(0)
    shapes = [(3, length, 4, 8), (3, context + length, 2, 8), (3, context + length, 2, 6), (3, length, 4, 6)]
    return [torch.randn(s).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def visible(length: int, context: int) -> Tensor:
    return torch.arange(context + length) <= torch.arange(length)[:, None] + context


def reference(inputs: Sequence[Tensor], gradient: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients by definition."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    hidden = ~visible(q.shape[2], k.shape[2] - q.shape[2])
    scores = (q @ k.repeat_interleave(2, 1).mT * scale).masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.to(dtype))]


@pytest.mark.parametrize(("length", "context"), [(1, 0), (7, 0), (7, 5), (1, 9), (32, 0), (33, 1), (70, 30)])
@pytest.mark.parametrize(("held", "block"), [(1, 128), (2**20, 128), (2**20, 3), (2**20, 32)])
def test_gradients_are_those_of_attention(
    length: int, context: int, held: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", held)
    monkeypatch.setattr(attention, "BLOCK", block)
    *inputs, gradient = drawn(length, context, torch.float64)
    out = CausalAttention.apply(*inputs, 0.3)
    found = [out, *torch.autograd.grad(out, inputs, gradient)]
    torch.testing.assert_close(found, reference(inputs, gradient, 0.3, torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("length", "context"), [(60, 0), (30, 70), (300, 0)])
def test_bfloat16_is_as_near_to_float64_as_the_definition_in_bfloat16(length: int, context: int) -> None:
    *inputs, gradient = drawn(length, context, torch.bfloat16)
    right = reference(inputs, gradient, 0.35, torch.float64)

    def errors(found: Sequence[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]

    out = CausalAttention.apply(*inputs, 0.35)
    ours = errors([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    naive = errors(reference(inputs, gradient, 0.35, torch.bfloat16))
    assert all(a <= 1.2 * b for a, b in zip(ours, naive, strict=True)), (ours, naive)
