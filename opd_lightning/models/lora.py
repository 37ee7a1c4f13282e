"""LoRA students, through peft."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


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
