"""Prompts with images: from the parts of chat messages to tokens and what a processor makes of the pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.data.templates import Template
from opd_lightning.media import Media
from opd_lightning.paths import data_file

if TYPE_CHECKING:
    from PIL.Image import Image

BESIDE = ("input_ids", "attention_mask")
"""What every processor makes, and a prompt has already."""


def parts_of(prompt: Any) -> list[Mapping[str, Any]]:
    """The typed parts of all messages of a prompt; none for one that is text alone."""
    if isinstance(prompt, str):
        return []
    return [part for message in prompt if not isinstance(message["content"], str) for part in message["content"]]


def said(prompt: Any) -> str:
    """What a person reads of a prompt: its last message, with [image] where one stands."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(p["text"]) if p.get("type") == "text" else f"[{p.get('type')}]" for p in content)


def images_of(prompt: Any) -> list[Mapping[str, Any]]:
    """The parts of a prompt that are images, in order.

    Raises:
        ValueError: for a part that is neither text nor an image.
    """
    found = [part for part in parts_of(prompt) if part.get("type") != "text"]
    for part in found:
        if part.get("type") != "image":
            raise ValueError(f"a prompt holds a part of type {part.get('type')!r}: text and images pass here (data.prompts)")
    return found


def decoded(part: Mapping[str, Any]) -> Image:
    """The image that a part stands for.

    Raises:
        ValueError: for one that is neither a file nor an image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError("a prompt holds an image (data.prompts): pip install 'opd_lightning[images]'") from error
    given = part.get("path", part.get("image"))
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if not isinstance(given, str):
        raise ValueError(
            f"an image of a prompt comes with {sorted(set(part) - {'type'}) or 'nothing'}: give its file as `path`, or an "
            "image of a data set as `image` (data.prompts). Nothing is downloaded"
        )
    with Image.open(data_file(given)) as opened:
        return opened.convert("RGB")


def rendered(
    template: Template,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    processor: Callable[[], Any] | None,
) -> list[tuple[tuple[int, ...], Media | None]]:
    """Tokens of rendered rows, and what the model is shown beside them; rows without images are tokenized together.

    Args:
        template: renders the rows.
        rows: their columns.
        tokenizer: of the model.
        processor: gives the model's processor, or says why there is none; None where nobody looks.

    Raises:
        ValueError: for images and a model that cannot look, or a chat template that shows another number of them.
    """
    looking = {i: images for i, row in enumerate(rows) if (images := images_of(row["prompt"]))}
    rest = [i for i in range(len(rows)) if i not in looking]
    out: dict[int, tuple[tuple[int, ...], Media | None]] = {}
    for i, ids in zip(rest, template.ids([rows[i] for i in rest], tokenizer), strict=True):
        out[i] = (ids, None)
    if looking and processor is None:
        raise ValueError("a prompt holds an image (data.prompts), and nothing here looks at it")
    seeing = processor() if looking and processor is not None else None
    for i, images in looking.items():
        out[i] = _shown(template.text(rows[i], tokenizer), images, seeing)
    return [out[i] for i in range(len(rows))]


def _shown(text: str, images: Sequence[Mapping[str, Any]], processor: Any) -> tuple[tuple[int, ...], Media]:
    """The template writes one placeholder an image; the processor makes as many of it as the image takes up."""
    placeholder = str(getattr(processor, "image_token", ""))
    shown = text.count(placeholder) if placeholder else len(images)
    if shown != len(images):
        raise ValueError(
            f"a prompt holds {len(images)} images, and the rendered text shows {shown} ({placeholder!r}): the chat template of "
            f"the tokenizer must write {placeholder!r} for a part of type 'image' (data.template)"
        )
    made = processor(text=[text], images=[decoded(part) for part in images], add_special_tokens=False, return_tensors="pt")
    ids = tuple(made["input_ids"][0].tolist())
    extra = {name: x for name, x in made.items() if name not in BESIDE}
    one_a_token = {name: x[0] for name, x in extra.items() if tuple(x.shape) == (1, len(ids))}
    return ids, Media({name: x for name, x in extra.items() if name not in one_a_token}, one_a_token)
