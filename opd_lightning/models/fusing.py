"""The small operations of a decoder's layers, each in one pass (`opd_lightning.ops.pointwise`), in transformers' own layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from opd_lightning.ops import pointwise

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the configurations whose layers have Llama's norm, gate and rotary positions."""

ROTARY = "apply_rotary_pos_emb"
"""How transformers calls the function that turns queries and keys."""


def fuse(base: Any) -> None:
    """Let the layers of a Llama-like model compute norms, gates and rotary positions in one pass each where that is possible:
    in bfloat16 and float32 on a CPU. In other precisions, and where inputs have several, they do what transformers wrote.
    """
    config = base.config
    if config.model_type not in LLAMA_LIKE or config.hidden_act not in ("silu", "swish") or pointwise.library() is None:
        return
    for module in base.modules():
        stock: Any = type(module)
        kind = _fused(stock)
        if kind is not None:
            module.__class__ = kind  # as FSDP2 and torch's parametrizations do: weights, hooks and copies stay what they are


def split(base: nn.Module) -> None:
    """The contrary of `fuse`."""
    for module in base.modules():
        module.__class__ = getattr(type(module), "stock", type(module))


@functools.cache
def _fused(kind: Any) -> type[nn.Module] | None:
    """The class with its small operations fused; None if there is nothing to fuse, or it is fused already."""
    stock: Any = kind.forward
    if hasattr(kind, "stock"):
        return None
    if kind.__name__.endswith("RMSNorm"):
        forward = _norm(stock)
    elif kind.__name__.endswith("MLP"):
        forward = _feed_forward
    elif ROTARY in getattr(getattr(stock, "__code__", None), "co_names", ()):
        forward = _with_function(stock, ROTARY, _rotary(stock.__globals__[ROTARY]))
    else:
        return None
    return type(kind.__name__, (kind,), {"forward": forward, "stock": kind, "__module__": kind.__module__})


def _norm(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if pointwise.computes(hidden_states, self.weight):
            return pointwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return stock(self, hidden_states)

    return forward


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    inside = pointwise.gated(gate, up) if pointwise.computes(gate, up) else self.act_fn(gate) * up
    down: Tensor = self.down_proj(inside)
    return down


def _rotary(stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """q, k (1, heads, M, d), cos, sin (1, M, d)."""
        if unsqueeze_dim != 1 or len(q) != 1 or not pointwise.computes(q, k, cos, sin):
            return stock(q, k, cos, sin, unsqueeze_dim)
        turned, turned_keys = (pointwise.rotated(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
        return turned, turned_keys

    return rotate


def _with_function(stock: FunctionType, name: str, function: Callable[..., Any]) -> FunctionType:
    """A copy of a function that calls another one by a name of its module."""
    same = FunctionType(stock.__code__, {**stock.__globals__, name: function}, stock.__name__, stock.__defaults__)
    same.__kwdefaults__ = stock.__kwdefaults__
    return same
