"""Causal attention in bfloat16 on a CPU: rows in whole blocks, with a backward pass of matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

MULTIPLE = 32
"""Rows are padded to a multiple of so many tokens. PyTorch's forward kernel (2.13) takes 1.6 times as long with 63 queries as
with 64, 1.8 times with 191 as with 192 and 1.4 times with 255 as with 256."""

BLOCK = 128
"""Queries of a row that the backward pass takes at once. They meet no key behind them: with 512 queries, 5/8 of all scores."""

SCORES = 2**20
"""Scores of the backward pass that are held at once: a few of these tables fit into the caches of two cores."""


class CausalAttention(torch.autograd.Function):
    """PyTorch's own forward pass; the scores are computed again backwards, some queries of some rows at a time.

    With P = softmax(scale Q Kᵀ) and dP = dO Vᵀ: dV = Pᵀ dO, dS = P ∘ (dP - rowsum(P ∘ dP)), dQ = scale dS K,
    dK = scale dSᵀ Q. All four tables are rounded to the dtype, as in attention by its definition; sums inside a block are not.
    PyTorch's backward pass in bfloat16 takes 1.8 to 3 times as long (rows of 63 to 512 queries, torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, heads, L, d').

        Args:
            ctx: of autograd.
            query: (B, heads, L, d).
            key: (B, key heads, K, d); the own tokens of a row are the last L of K, and those before them are seen by all.
            value: (B, key heads, K, d').
            scale: of the scores.
        """
        length, ctx.seen, ctx.scale = query.shape[2], key.shape[2], scale
        ctx.context = context = ctx.seen - length
        query, key, value = (_padded(x) for x in (query, key, value))
        ctx.save_for_backward(query, key, value)
        mask = _hidden(query, key.shape[2], context + 1) if context else None
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        return out[:, :, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        own, seen, groups = gradient.shape[2], ctx.seen, key.shape[1]
        shared = query.shape[1] // groups
        # (rows * key heads, L * queries that share a key head, d); a gradient of zeros adds nothing
        whole_q, whole_g = (
            x.unflatten(1, (groups, shared)).transpose(2, 3).flatten(0, 1).flatten(1, 2) for x in (query, _padded(gradient))
        )
        whole_k, whole_v = (x.flatten(0, 1) for x in (key, value))
        of_q, of_k, of_v = (x.new_empty(x.shape) for x in (whole_q, whole_k, whole_v))
        hidden = _hidden(query, min(BLOCK, query.shape[2]), 1).repeat_interleave(shared, 0)
        last = (own - 1) // BLOCK * BLOCK
        for start in range(last, -1, -BLOCK):  # the last queries see all keys: their gradients are written, later ones added
            block = slice(start * shared, (start + BLOCK) * shared)
            first, rows = ctx.context + start, whole_q[0, block].shape[0]
            stop = min(first + rows // shared, key.shape[2])
            step = max(1, SCORES // (rows * stop))
            for at in (slice(a, a + step) for a in range(0, len(whole_q), step)):
                q, g, k, v = whole_q[at, block], whole_g[at, block], whole_k[at, :stop], whole_v[at, :stop]
                scores = torch.baddbmm(q[:1, :1, :1], q, k.mT, beta=0, alpha=ctx.scale)
                scores[..., first:] += hidden[:rows, : stop - first]
                p = scores.softmax(-1)
                of_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
                of_v[at, :stop].baddbmm_(p.mT, g, beta=start < last)
                of_k[at, :stop].baddbmm_(of_scores.mT, q, beta=start < last, alpha=ctx.scale)
                of_q[at, block].baddbmm_(of_scores, k, beta=0, alpha=ctx.scale)
        of_query = of_q.view(-1, groups, query.shape[2], shared, query.shape[3]).transpose(2, 3).flatten(1, 2)
        return of_query[:, :, :own], of_k.view(key.shape)[:, :, :seen], of_v.view(value.shape)[:, :, :seen], None


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the rows of (B, heads, L, d), up to the next multiple."""
    missing = -x.shape[2] % MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _hidden(queries: Tensor, keys: int, first: int) -> Tensor:
    """(L, keys) minus infinity where a query may not look, else 0. The first query sees the keys before ``first``."""
    return queries.new_full((queries.shape[2], keys), -torch.inf).triu_(first)
