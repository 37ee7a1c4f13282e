"""The output head of a language model: hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """``cap * tanh(factor * (W h + b) / cap)``, cut to the rows that carry a token.

    Attributes:
        module: the matrix product: an ``nn.Linear``, or anything else that takes its place (an adapted one).
        vocab: rows that carry a token; those of a padded vocabulary behind them are left out.
        factor: scale of the logits.
        cap: soft cap of the logits; None has none.
    """

    module: nn.Module
    vocab: int
    factor: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the product is known: one matrix and perhaps a bias, and no hook on it."""
        return type(self.module) is nn.Linear and not self.module._forward_hooks and not self.module._forward_pre_hooks

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Its trainable parameters."""
        return tuple(p for p in self.module.parameters() if p.requires_grad)

    def finish(self, product: Float[Tensor, "*n R"]) -> Float[Tensor, "*n V"]:
        """Logits from the matrix product."""
        logits = product[..., : self.vocab]
        if self.factor != 1.0:
            logits = logits * self.factor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    @property
    def bare(self) -> bool:
        """Whether the product already is the logits."""
        return self.factor == 1.0 and not self.cap

    def __call__(self, hidden: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        return self.finish(self.module(hidden))
