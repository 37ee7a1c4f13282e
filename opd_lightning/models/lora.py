"""LoRA students, through peft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@dataclass
class LoRA:
    """Low-rank adapters on a frozen student (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: rank.
        alpha: scaling numerator; the adapter is multiplied by alpha / r.
        dropout: on the adapter's input, in [0, 1).
        target_modules: names of the layers that get an adapter; ``all-linear`` is every linear layer but the head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r={self.r}: the rank must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout={self.dropout}: must lie in [0, 1)")


def add_lora(model: nn.Module, lora: LoRA, seed: int) -> PeftModel:
    """Wrap a model; the adapter's initial weights depend on ``seed`` alone, so every rank makes the same ones.

    Raises:
        ValueError: if no layer matches ``target_modules``, listing what there is.
    """
    names = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft annotates int, and computes alpha / r
        lora_dropout=lora.dropout,
        target_modules=names[0] if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped: PeftModel = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
    except ValueError as error:
        layers = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"lora.target_modules={names}: {error}\n  Linear layers of this model: {', '.join(layers)}") from error
    return wrapped


def base_of(model: nn.Module) -> nn.Module:
    """The Hugging Face model below an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters_at_work(model: nn.Module) -> frozenset[tuple[object, ...]]:
    """The distinct states of a model's adapted layers: active adapters, whether they are switched off, whether merged."""
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return frozenset((*m.active_adapters, m.disable_adapters, m.merged) for m in layers)


@dataclass(frozen=True)
class LinearParts:
    """A linear layer taken apart: ``x -> x W^T + bias + sum of scale * x A^T B^T`` over the adapters (A, B, scale) at work.

    Attributes:
        weight: (out, in).
        bias: (out,) or None.
        adapters: A (r, in), B (out, r) and alpha / r of each.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> LinearParts | None:
        """The parts of a layer; None for one that computes something else."""
        if type(layer) is nn.Linear:
            return cls(layer.weight, layer.bias)
        if not isinstance(layer, LoraLinear) or type(layer.base_layer) is not nn.Linear:
            return None
        plain = layer.disable_adapters or layer.merged
        active = [] if plain else [a for a in layer.active_adapters if a in layer.lora_A]
        if (layer.disable_adapters and layer.merged) or any(a in layer.lora_variant or layer.lora_bias[a] for a in active):
            return None
        factors: Any = [(layer.lora_A[a].weight, layer.lora_B[a].weight, layer.scaling[a]) for a in active]
        return cls(layer.base_layer.weight, layer.base_layer.bias, tuple(factors))

    def rows(self, count: int) -> LinearParts:
        """The layer with its first ``count`` outputs."""
        bias = None if self.bias is None else self.bias[:count]
        return LinearParts(self.weight[:count], bias, tuple((a, b[:count], scale) for a, b, scale in self.adapters))

    def merged(self) -> Tensor:
        """W + sum of scale * B A, in the weight's dtype; the layer itself is left as it is."""
        whole = self.weight
        for down, up, scale in self.adapters:
            whole = torch.addmm(whole, up.to(whole.dtype), down.to(whole.dtype), alpha=scale)
        return whole


def plain_state(base: nn.Module) -> dict[str, Tensor]:
    """The weights of a Hugging Face model, adapters at work merged; a tied tensor under each of its names.

    Raises:
        ValueError: for an adapter that cannot be merged.
    """
    adapted = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in adapted)
    # not state_dict(), which would take gathered weights apart again under FSDP2
    named = base.named_parameters(remove_duplicate=False)
    state = {name: parameter.detach() for name, parameter in named if not name.startswith(inside)}
    for name in adapted:
        parts = LinearParts.of(base.get_submodule(name))
        if parts is None:
            raise ValueError(f"the adapter of {name} cannot be merged: {type(base.get_submodule(name)).__name__}")
        state[f"{name}.weight"] = parts.merged().detach()
        if parts.bias is not None:
            state[f"{name}.bias"] = parts.bias.detach()
    return state
