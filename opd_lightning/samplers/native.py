"""The native sampler: batched decoding with a key-value cache, in plain PyTorch.

Each row draws from its own stream of random numbers by inverting the cumulative distribution, so what is written depends on
the weights, the prompt and the row's seed: not on the batch it shares, the rank that runs it, or the global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from opd_lightning.configurable import Configurable
from opd_lightning.models.lora import base_of
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.ops.logprobs import floor_of
from opd_lightning.seeds import uniforms
from opd_lightning.types import Completion

__all__ = ["NativeSampler"]

COMPACT_AT = 0.125
"""Finished rows are dropped from the batch once they are this share of it: dropping copies the cache, keeping computes."""


class NativeSampler(Configurable):
    """Writes completions with a Hugging Face causal language model.

    Args:
        temperature: divides the logits before sampling; 0 takes the likeliest token. Anything but 1 makes the completions
            off-policy for an objective at temperature 1.
        top_p: sample from the smallest set of tokens with at least this mass; 1 keeps all.
        top_k: sample from this many likeliest tokens; 0 keeps all.
        max_new_tokens: longest completion; a longer one is cut and counts as truncated.
        batch_size: rows decoded together.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 64,
    ) -> None:
        for name, value, fits, allowed in (
            ("temperature", temperature, temperature >= 0.0, "at least 0"),
            ("top_p", top_p, 0.0 < top_p <= 1.0, "in (0, 1]"),
            ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"sampler.{name}={value}: must be {allowed}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        vocabulary: Vocabulary,
        policy_step: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt.

        Args:
            model: the writer, in eval mode, with whole weights.
            prompts: token ids.
            seeds: one a prompt.
            vocabulary: its end tokens close a completion, its padding rows are never sampled.
            policy_step: recorded in the completions.
            on_progress: called with the number of rows finished so far.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths decode together
        written: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self._decode(model, [prompts[i] for i in rows], [seeds[i] for i in rows], vocabulary, policy_step)
            written.update(zip(rows, batch, strict=True))
            if on_progress:
                on_progress(len(written))
        return [written[i] for i in range(len(prompts))]

    def _decode(
        self,
        model: nn.Module,
        prompts: list[Sequence[int]],
        seeds: list[int],
        vocabulary: Vocabulary,
        policy_step: int,
    ) -> list[Completion]:
        base: Any = base_of(model)
        device = next(base.parameters()).device
        ids, mask = _left_padded(prompts, vocabulary.pad_id, device)
        randoms = uniforms(seeds, self.max_new_tokens).to(device)
        ends = torch.tensor(vocabulary.eos_ids, device=device)
        cache = DynamicCache(config=base.config)
        alive = torch.arange(len(prompts), device=device)
        tokens = torch.full((len(prompts), self.max_new_tokens), vocabulary.pad_id, device=device)
        logprobs = torch.zeros(tokens.shape, device=device)
        lengths = torch.full((len(prompts),), self.max_new_tokens, device=device)
        open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for t in range(self.max_new_tokens):
            law = self._law(self._step(base, ids, mask, cache)[:, : vocabulary.size])
            drawn, recorded = self._draw(law, randoms[alive, t])
            was_open = open_rows[alive]
            tokens[alive[was_open], t] = drawn[was_open]
            logprobs[alive[was_open], t] = recorded[was_open]
            ended = was_open & torch.isin(drawn, ends)
            lengths[alive[ended]] = t + 1
            open_rows[alive[ended]] = False
            still = open_rows[alive]
            count = int(still.sum())
            if count == 0:
                break
            ids, mask = drawn[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            if count <= (1.0 - COMPACT_AT) * len(alive):
                kept = still.nonzero().squeeze(-1)
                alive, ids, mask = alive[kept], ids[kept], mask[kept]
                cache.batch_select_indices(kept)
        return [
            Completion(tuple(row[:n]), tuple(recorded[:n]), ended, policy_step)
            for row, recorded, n, ended in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), (~open_rows).tolist(), strict=True
            )
        ]

    def _step(self, base: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """(rows, V) logits of the next token; the cache grows by ``ids``."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        padded = None if bool(mask.all()) else mask
        out = base(
            input_ids=ids,
            attention_mask=padded,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _law(self, logits: Tensor) -> Tensor:
        """(rows, V) log-probabilities of the law that is sampled, float32."""
        logits = logits.float()
        if self.temperature == 0.0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, floor_of(logits.dtype)).scatter_(-1, best, 0.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            worst_kept = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < worst_kept, -torch.inf)
        if self.top_p < 1.0:
            ranked, ids = logits.softmax(-1).sort(-1, descending=True)
            outside = ranked.cumsum(-1) - ranked >= self.top_p  # the token that crosses the line is kept
            logits = logits.masked_fill(outside.gather(-1, ids.argsort(-1)), -torch.inf)
        return logits.log_softmax(-1)

    @staticmethod
    def _draw(law: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row by inverting its cumulative distribution, and the token's log-probability."""
        cumulative = law.exp().cumsum(-1)
        total = cumulative[:, -1:]
        point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulative, point, right=True).clamp(max=law.shape[-1] - 1)
        return drawn.squeeze(-1), law.gather(-1, drawn).squeeze(-1)


def _left_padded(prompts: list[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, P) ids and mask, padded on the left so that all rows continue at the same place."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.tensor([longest - len(p) for p in prompts], device=device)
    return ids, (torch.arange(longest, device=device) >= starts[:, None]).long()
