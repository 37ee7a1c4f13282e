"""Tiny random models that look, and prompts for them; shared by tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from opd_lightning.media import Media
from opd_lightning.models.tiny import character_tokenizer
from opd_lightning.types import Prompt

ALPHABET = "0123456789+=,;&c# abdefghijklmnopqrstuvwxyz?."
CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}="
)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def talking(*special: str) -> Any:
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = CHAT
    return tokenizer


def llava(folder: Path, seed: int, size: int = 8) -> Path:
    """A random Llava with its processor, as a folder: images of ``size`` pixels, 4 of them a token's side."""
    tokenizer = talking("<image>")
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer), initializer_range=0.2, bos_token_id=1, eos_token_id=2),
        vision_config=CLIPVisionConfig(**VISION, image_size=size, patch_size=4, initializer_range=0.5, projection_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    looking = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LlavaProcessor(looking, tokenizer, 4, "default", chat_template=CHAT, num_additional_image_tokens=1).save_pretrained(folder)
    return folder


def rows_with_images(folder: Path, images: Sequence[bool]) -> Path:
    """A file of questions of unequal lengths, each about an image of its own or about none."""
    rows = []
    for i, looks in enumerate(images):
        content: Any = [{"type": "text", "text": "what is it?"[: 4 + i % 8]}]
        if looks:
            pixels = np.random.default_rng(i).integers(0, 255, (9 + i, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            content = [{"type": "image", "path": str(folder / f"{i}.png")}, *content]
        rows.append({"prompt": [{"role": "user", "content": content}], "code": str(i)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


QWEN = ("<image>", "<video>", "<start>", "<end>")


def qwen(folder: Path, seed: int) -> Path:
    """A random Qwen2-VL, as a folder without a processor: that needs torchvision, for videos."""
    tokenizer = talking(*QWEN)
    image, video, start, end = (tokenizer.convert_tokens_to_ids(t) for t in QWEN)
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen_prompts(images: Sequence[Sequence[tuple[int, int]]]) -> list[Prompt]:
    """Prompts with images of the given heights and widths, as its processor's part for images makes them."""
    image, _, start, end = (talking(*QWEN).convert_tokens_to_ids(t) for t in QWEN)
    looking = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    prompts = []
    for row, sizes in enumerate(images):
        ids = [7, 8, 9][: row % 4 + 1]
        types, grids, pixels = [0] * len(ids), [], []
        for height, width in sizes:
            pixel = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
            made = looking(images=[Image.fromarray(pixel)], return_tensors="pt")
            count = int(made["image_grid_thw"].prod()) // 4
            ids += [start, *[image] * count, end, 5]
            types += [0, *[1] * count, 0, 0]
            grids.append(made["image_grid_thw"])
            pixels.append(made["pixel_values"])
        shown = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if sizes else {}
        media = Media(shown, {"mm_token_type_ids": torch.tensor(types)}) if sizes else None
        prompts.append(Prompt(row, "", tuple(ids), row=row, media=media))
    return prompts
