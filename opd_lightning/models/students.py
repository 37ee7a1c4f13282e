"""Students: recipes that build a trainable causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opd_lightning.configurable import Configurable
from opd_lightning.models.loading import DTYPES, load_config, load_model, load_tokenizer, local_folder
from opd_lightning.models.lora import LoRA, add_lora
from opd_lightning.models.processors import load_processor

__all__ = ["Student"]


class Student(Configurable):
    """A student, loaded from a checkpoint. Nothing heavy happens before `build`.

    Args:
        path: a hub name, a folder, a ``.gguf`` file, ``zoo/<task>/<model>``, or ``package:<module>/<file>``.
        dtype: of the weights. Optimizers need float32 or bfloat16.
        lora: train low-rank adapters instead of all weights; null trains all weights.
        keep_layers: make a smaller student out of a big model: a number keeps that many decoder layers, evenly spaced with
            the first and the last among them; a list names the layers.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        seed: of the adapters' initial weights.

    Raises:
        ValueError: for an unknown dtype.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        lora: LoRA | None = None,
        keep_layers: int | list[int] | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"student.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
        self.path, self.dtype, self.lora, self.keep_layers = path, dtype, lora, keep_layers
        self.gradient_checkpointing, self.seed = gradient_checkpointing, seed

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, without the weights."""
        return load_tokenizer(self.path)

    def config(self) -> Any:
        """The architecture, without the weights."""
        return load_config(self.path)

    def processor(self) -> Any:
        """What turns the images of a prompt into tensors; see `opd_lightning.models.processors.load_processor`."""
        return load_processor(self.path, local_folder(self.path), self.config())

    def weights(self) -> nn.Module:
        """The bare model."""
        return load_model(self.path, self.dtype)

    def build(self) -> nn.Module:
        """The model in train mode: pruned, adapted and checkpointed as the recipe says."""
        model: Any = self.weights()
        if self.keep_layers is not None:
            prune_layers(model, self.keep_layers)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = add_lora(model, self.lora, self.seed)
        model.train()  # from_pretrained hands out eval mode: dropout and checkpointing would stay off
        built: nn.Module = model
        return built


def kept_layers(total: int, keep: int | list[int]) -> list[int]:
    """Which layers survive.

    Raises:
        ValueError: if the choice does not fit the model.

    >>> kept_layers(30, 4)
    [0, 10, 19, 29]
    """
    if isinstance(keep, int):
        if not 1 <= keep <= total:
            raise ValueError(f"student.keep_layers={keep}: the model has {total} layers; give 1 to {total}")
        return [round(i * (total - 1) / max(keep - 1, 1)) for i in range(keep)]
    if not keep or sorted(set(keep)) != list(keep) or not 0 <= keep[0] <= keep[-1] < total:
        raise ValueError(f"student.keep_layers={keep}: give increasing layer numbers between 0 and {total - 1}")
    return list(keep)


def prune_layers(model: Any, keep: int | list[int]) -> None:
    """Drop decoder layers in place; configuration and cache indices follow.

    Raises:
        ValueError: if the architecture has no list of layers, or the choice does not fit.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"student.keep_layers: {type(model).__name__} has no plain list of decoder layers")
    chosen = kept_layers(len(decoder.layers), keep)
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in chosen)
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config = model.config.get_text_config()
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen]


def trainable_report(model: nn.Module) -> str:
    """``1.2 M of 136 M parameters are trained (0.9 %)``."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise ValueError("student.dtype=float16 cannot be trained safely: use bfloat16 or float32")
    return f"{trained / 1e6:.3g} M of {total / 1e6:.3g} M parameters are trained ({100 * trained / max(total, 1):.3g} %)"
