"""Models that look: which they are, the processor beside their weights, and their forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from opd_lightning.media import Media, Shown, batched
from opd_lightning.ops.masks import flatten_completions
from opd_lightning.types import Rendering

MODALITIES = ("image", "video", "audio")


def looks(config: Any) -> bool:
    """Whether a model of this architecture takes images beside its tokens, and is loaded whole."""
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "is_encoder_decoder", False):
        return False
    # some configurations also stand for their language part alone, which is what was loaded ever since
    known = MODEL_FOR_CAUSAL_LM_MAPPING
    return kind not in known or known[kind] is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]


def auto_class(config: Any) -> Any:
    """What loads the model."""
    return AutoModelForImageTextToText if looks(config) else AutoModelForCausalLM


@lru_cache(maxsize=8)
def _processor(folder: str) -> Any:
    from transformers import AutoProcessor  # takes long to import, and most runs read text only

    return AutoProcessor.from_pretrained(folder)


def load_processor(path: str, folder: str, config: Any) -> Any:
    """What turns the images of a prompt into tensors. It is asked for only when a prompt holds one.

    Args:
        path: as the user gave it.
        folder: where it lies.
        config: of the model.

    Raises:
        ValueError: for a model that reads text only.
        OSError: if there is none beside the weights.
    """
    if not looks(config):
        raise ValueError(
            f"a prompt holds an image (data.prompts), but {path!r} ({config.model_type}) reads text only: give a model with a "
            "processor (model.student.path, model.teacher.path), or prompts without images"
        )
    try:
        found = _processor(folder)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(
            f"a prompt holds an image (data.prompts), but no processor can be loaded for {path!r} (looked in {folder!r}): "
            f"{error}"
        ) from error
    if not hasattr(found, "image_processor"):
        raise OSError(f"a prompt holds an image (data.prompts), but {folder!r} has no image processor beside the weights")
    return found


def placeholders(config: Any) -> list[int]:
    """Tokens that stand for what is looked at; they are no text and are never written."""
    names = (f"{m}_token_{end}" for m in MODALITIES for end in ("id", "index"))
    return sorted({i for n in names if isinstance(i := getattr(config, n, None), int)})


def expect_shown(config: Any, ids: Tensor, shown: Shown | None) -> None:
    """Rows with placeholders must bring what these stand for: many models would silently read them as words.

    Args:
        config: of the model.
        ids: (B, L) the rows.
        shown: what each of them brings.

    Raises:
        ValueError: naming the first row.
    """
    tokens = placeholders(config)
    if not tokens:
        return
    holds = torch.isin(ids, torch.tensor(tokens, device=ids.device)).any(-1).tolist()
    for row, held in enumerate(holds):
        media = shown[row] if shown is not None else None
        if held and (media is None or not media.shows):
            raise ValueError(
                f"row {row} holds tokens that stand for an image (ids {', '.join(map(str, tokens))}), and no pixels come with "
                "it: what a processor made must travel with the prompt (Prompt.media, Rendering.media)"
            )


@lru_cache(maxsize=64)
def _accepted(kind: Any, names: tuple[str, ...]) -> frozenset[str]:
    """Those names that a forward pass knows; a line for those that are left out."""
    known = inspect.signature(kind.forward).parameters
    if dropped := [n for n in names if n not in known]:
        rank_zero_info(f"{kind.__name__} takes no {', '.join(dropped)}: left out of what its processor makes")
    return frozenset(n for n in names if n in known)


def inputs_for(model: nn.Module, shown: tuple[Media | None, ...], starts: list[int], width: int) -> dict[str, Tensor]:
    """Keyword arguments of a model's forward pass, on its device and in its precision. See `opd_lightning.media.batched`."""
    first = next(model.parameters())
    found = batched(shown, starts, width)
    kind: Any = type(model)
    keep = _accepted(kind, tuple(found))
    moved = {k: x.to(first.device) for k, x in found.items() if k in keep}
    return {k: x.to(first.dtype) if x.is_floating_point() else x for k, x in moved.items()}


def seen_states(base: Any, text: Rendering) -> Tensor:
    """(N, D) hidden states at the completion tokens of right-padded rows, some of which look at something.

    The model itself puts together what its vision tower saw and where everything stands (its positions may have three axes):
    it gets whole rows, with a mask over their padding, and nothing shared or packed.

    Raises:
        ValueError: for a model that reads text only, and for rows without the pixels that they need.
    """
    assert text.media is not None
    if not looks(base.config):
        raise ValueError(
            f"{type(base).__name__} reads text only, and was asked about an image: give it a prompt without "
            "(data.teacher_template), or another model (model.student.path, model.teacher.path)"
        )
    trunk, width = base.base_model, text.ids.shape[1]
    expect_shown(base.config, text.ids, text.media)
    inputs = inputs_for(trunk, text.media, [0] * len(text.ids), width)
    mask = (torch.arange(width, device=text.ids.device) < text.lengths[:, None]).long()
    out = trunk(input_ids=text.ids, attention_mask=mask, use_cache=False, **inputs)
    return flatten_completions(out.last_hidden_state, text.mask)


def _eyes(base: Any) -> list[nn.Parameter]:
    """Trained weights beside the language model and its head."""
    text = {id(p) for m in (base.get_decoder(), base.get_output_embeddings()) for p in m.parameters()}
    return [p for p in base.parameters() if p.requires_grad and id(p) not in text]


def close_eyes(base: Any) -> None:
    """Freeze what is beside the language model, for a run that shows it nothing: weight decay would shrink it unseen."""
    if not looks(base.config) or not (eyes := _eyes(base)):
        return
    for weight in eyes:
        weight.requires_grad_(False)
    total = sum(p.numel() for p in eyes) / 1e6
    rank_zero_info(f"no prompt holds an image (data.prompts): {total:.3g} M weights beside the language model are not trained")


@contextmanager
def eyes_attached(base: Any) -> Iterator[None]:
    """Inside, every trained weight beside the language model takes part in the forward pass with a gradient of zero.

    Rows without images never pass the vision tower, and many models leave its last layer out. Processes that share a batch
    wait for a gradient of every trained weight from each other, in one order: so the zero comes in where images would, below
    the first layer. One process does the same, or it would step over weights that two do not.
    """
    beside = [p.sum() for p in _eyes(base)] if torch.is_grad_enabled() else []
    if not beside:
        yield
        return
    nothing = 0.0 * torch.stack(beside).sum()
    handle = base.get_input_embeddings().register_forward_hook(lambda _, __, out: out + nothing.to(out.dtype))
    try:
        yield
    finally:
        handle.remove()
