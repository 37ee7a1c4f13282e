"""Short hashes that tell whether two runs began from the same weights, tokens and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from opd_lightning.media import digests

PROBED = 64
"""Values of every tensor that are hashed: a few milliseconds for any model, and no two trainings agree in them."""


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def of_weights(model: nn.Module | None) -> str:
    """Of names, shapes and the first values of all parameters; in words where there are none, or they are sharded."""
    if model is None:
        return "no weights of its own"
    tensors = dict(model.named_parameters())
    if any(hasattr(p, "full_tensor") for p in tensors.values()):
        return "sharded: not hashed"
    probes = [p.detach().flatten()[:PROBED].to("cpu", torch.float64) for p in tensors.values()]
    return _digest(
        part
        for (name, p), probe in zip(tensors.items(), probes, strict=True)
        for part in (f"{name}{tuple(p.shape)}".encode(), probe.numpy().tobytes())
    )


def of_tokenizer(tokenizer: Any) -> str:
    """Of the vocabulary with its ids."""
    return _digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()])


def of_prompts(data: Any) -> dict[str, Any]:
    """Of training and held-out prompts (tokens of student, teacher and reference), and how many texts are in both."""
    train, held = data.train_prompts, data.eval_prompts
    texts = {p.text for p in train}

    def digest(prompts: Any) -> str:
        return _digest(
            json.dumps([p.ids, p.teacher_ids, p.reference, *digests(p.media, p.teacher_media)]).encode() for p in prompts
        )

    return {
        "training prompts": len(train),
        "training prompts, hash": digest(train),
        "held-out prompts": len(held),
        "held-out prompts, hash": digest(held),
        "held-out prompts that are trained on": sum(p.text in texts for p in held),
    }
