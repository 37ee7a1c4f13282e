"""Writes completions of one exact length: our sampler, or transformers' generate. One process an engine."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from gate import NEVER
from opd_lightning.models.loading import load_model, load_tokenizer
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.samplers import NativeSampler
from protocol import answer, orders, peak_rss, versions


def prompts(count: int, tokens: int, vocab: int) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    draw = random.Random(0)
    return [[draw.randrange(10, vocab) for _ in range(tokens)] for _ in range(count)]


def ours(model: Any, vocabulary: Vocabulary) -> Callable[[list[list[int]], int], int]:
    """Our sampler; returns the number of tokens that it wrote."""
    seeds = iter(range(10**9))

    def write(given: list[list[int]], new: int) -> int:
        sampler = NativeSampler(max_new_tokens=new, batch_size=len(given))
        written = sampler.write(model, given, [next(seeds) for _ in given], vocabulary, 0)
        return sum(len(c.ids) for c in written)

    return write


def hf(model: Any, vocabulary: Vocabulary) -> Callable[[list[list[int]], int], int]:
    """The generate of transformers with its dynamic cache, the fastest of its caches on a CPU."""
    model.generation_config.eos_token_id = None

    def write(given: list[list[int]], new: int) -> int:
        ids = torch.tensor(given, device=model.device)
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, pad_token_id=vocabulary.pad_id, eos_token_id=None
        )
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return int(out.numel() - ids.numel())

    return write


def main() -> None:
    """Write until the pipe is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["ours", "hf"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    model: Any = load_model(given.model, given.dtype).eval()
    vocabulary = replace(Vocabulary.of(load_tokenizer(given.model)), eos_ids=NEVER)
    write = {"ours": ours, "hf": hf}[given.engine](model, vocabulary)
    answer(versions=versions("torch", "transformers"))
    for order in orders():
        batch = prompts(order["rows"], order["prompt_tokens"], vocabulary.size)
        started = time.perf_counter()
        tokens = write(batch, order["new_tokens"])
        answer(seconds=time.perf_counter() - started, tokens=tokens, peak_rss=peak_rss())


if __name__ == "__main__":
    main()
