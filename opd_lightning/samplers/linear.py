"""Linear layers for decoding: few rows meet the same weights again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from opd_lightning.models.lora import LinearParts

PACK_ROWS = 128
"""The batch that oneDNN is told to expect: with 8 to 1024 the layout is equally fast at every batch, with 1 it is slower."""

PACK_FLOAT32 = 2**18
"""Size from which a packed float32 layer is faster than a plain one (up to 2.8 x at 8 rows); smaller ones lose to its call."""

PIECE = 2**22
"""Largest packed piece. The C library keeps blocks of this size for itself; larger ones come from the system anew at every
refresh, page by page, which took ten times as long as the packing."""


class Linear:
    """One layer that gives the outputs of several layers with the same input side by side.

    On the CPU its weights are reordered once by oneDNN, which would otherwise do so at every call. Adapters are merged in 32
    bits and more. In 16 bits they stay beside the weight: a young adapter is smaller than the rounding step of what it would be
    added to, and merging would write with the base model.

    Args:
        dtype: of the products.
        packs: whether weights may be reordered; False keeps them as they lie, in ``plain``.
    """

    def __init__(self, dtype: torch.dtype, packs: bool = True) -> None:
        self.dtype, self.packs = dtype, packs
        self.plain: Tensor | None = None
        self.bias: Tensor | None = None
        self.packed: list[tuple[Tensor, Tensor | None]] = []
        self.adapter: tuple[Tensor, Tensor] | None = None

    def load(self, parts: Sequence[LinearParts]) -> None:
        """Read the weights of the layers."""
        beside = self.dtype.itemsize < 4 and any(p.adapters for p in parts)
        self.adapter = _side_by_side(parts) if beside else None
        weights = [(p.weight if beside else p.merged()).detach() for p in parts]
        bias = None
        if any(p.bias is not None for p in parts):
            biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in parts]
            bias = torch.cat(biases).to(self.dtype)
        if not self._packs(weights):
            self.plain, self.bias = self._joined(weights), bias
            return
        rows = max(1, PIECE // weights[0].shape[1])
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        pieces = whole.split(rows)
        pieces_of_bias = [None] * len(pieces) if bias is None else bias.split(rows)
        self.packed = [*self.packed, *[(whole, None)] * len(pieces)][: len(pieces)]
        for i, (piece, b) in enumerate(zip(pieces, pieces_of_bias, strict=True)):
            self.packed[i] = (whole, None)  # the old piece makes room for the new one
            piece = piece.to(self.dtype).contiguous()
            self.packed[i] = (torch.ops.mkldnn._reorder_linear_weight(piece, PACK_ROWS), b)

    def _joined(self, weights: list[Tensor]) -> Tensor:
        if len(weights) == 1:
            return weights[0].to(self.dtype).contiguous()
        if self.plain is None:
            return torch.cat(weights).to(self.dtype)
        start = 0
        for weight in weights:
            self.plain[start : start + len(weight)] = weight
            start += len(weight)
        return self.plain

    def _packs(self, weights: list[Tensor]) -> bool:
        if not self.packs or weights[0].device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return False
        if self.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return self.dtype == torch.float32 and sum(w.numel() for w in weights) >= PACK_FLOAT32

    def __call__(self, x: Tensor) -> Tensor:
        out = self._product(x if x.dtype == self.dtype else x.to(self.dtype))
        return out if self.adapter is None else self.adapted(x, out)

    def adapted(self, x: Tensor, out: Tensor) -> Tensor:
        """Outputs with what the adapter adds."""
        assert self.adapter is not None
        down, up = self.adapter
        return torch.addmm(out.to(down.dtype), x.to(down.dtype) @ down.T, up.T).to(self.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if self.plain is not None:
            return F.linear(x, self.plain, self.bias)
        call = torch.ops.mkldnn._linear_pointwise.default
        outs = [call(x, weight, bias, "none", [], "") for weight, bias in self.packed]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _side_by_side(parts: Sequence[LinearParts]) -> tuple[Tensor, Tensor]:
    """One adapter A (r, in), B (out, r) for layers side by side: each layer's own factors, its scale in B, zeros elsewhere."""
    down = torch.cat([a.detach() for p in parts for a, _, _ in p.adapters])
    up = down.new_zeros(sum(len(p.weight) for p in parts), len(down))
    row = column = 0
    for p in parts:
        for a, b, scale in p.adapters:
            up[row : row + len(b), column : column + len(a)] = b.detach() * scale
            column += len(a)
        row += len(p.weight)
    return down, up
