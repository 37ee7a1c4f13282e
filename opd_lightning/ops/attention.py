"""Causal attention of short rows on a CPU, with a backward pass of matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

SCORES = 2**20
"""Scores of the backward pass that are held at once: a few of these tables fit into the caches of two cores."""


class ShortAttention(torch.autograd.Function):
    """PyTorch's own forward pass; the scores are computed again backwards, a few rows at a time.

    With P = softmax(scale Q Kᵀ) and dP = dO Vᵀ: dV = Pᵀ dO, dS = P ∘ (dP - rowsum(P ∘ dP)), dQ = scale dS K,
    dK = scale dSᵀ Q. All four tables are rounded to the dtype, as in attention by its definition; sums are not. PyTorch's
    backward pass in bfloat16 takes two to five times as long up to 256 queries (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """(B, heads, L, d').

        Args:
            ctx: of autograd.
            query: (B, heads, L, d).
            key: (B, key heads, K, d); the own tokens of a row are the last L of K.
            value: (B, key heads, K, d').
            mask: (L, K) True where a query may look; None for K = L.
            scale: of the scores.
        """
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        rows, heads, length, _ = query.shape
        groups, seen = key.shape[1:3]
        hidden = torch.full((length, seen), -torch.inf, dtype=query.dtype, device=query.device).triu_(seen - length + 1)
        found = [torch.empty_like(x) for x in (query, key, value)]
        tensors = query, key, value, gradient  # queries that share a key head become rows of one matrix
        step = max(1, SCORES // (heads * length * seen))
        for at in (slice(a, a + step) for a in range(0, rows, step)):
            q, k, v, g = (x[at].flatten(0, 1).unflatten(0, (-1, x.shape[1] // groups)).flatten(1, 2) for x in tensors)
            scores = torch.add(hidden, torch.bmm(q, k.mT).view(-1, length, seen), alpha=ctx.scale)
            p = scores.softmax(-1)
            of_p = torch.bmm(g, v.mT).view_as(p)
            of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).view(len(k), -1, seen)
            of_value = torch.bmm(p.view_as(of_scores).mT, g)
            of_query, of_key = torch.bmm(of_scores, k).mul_(ctx.scale), torch.bmm(of_scores.mT, q).mul_(ctx.scale)
            for whole, part in zip(found, (of_query, of_key, of_value), strict=True):
                whole[at] = part.view(whole[at].shape)
        return *found, None, None
