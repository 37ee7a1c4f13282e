"""The native sampler: batched decoding with a key-value cache, in plain PyTorch.

Each row draws from its own stream of random numbers by inverting the cumulative distribution, so what is written depends on
the weights, the prompt and the row's seed: not on the batch it shares, the rank that runs it, or the global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from opd_lightning.configurable import Configurable
from opd_lightning.media import Media
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.samplers.drawing import Law
from opd_lightning.samplers.engines import Engine, engine_for
from opd_lightning.seeds import uniforms
from opd_lightning.types import Completion

__all__ = ["NativeSampler"]

AT_ONCE = 32
"""Steps that are left to an engine at once, if it can and no row ends: few enough for a signal not to wait for long."""

REFILL_AT = 0.125
"""Waiting prompts join once this share of the batch is free: reading one prompt costs nearly as much as reading a few."""


class NativeSampler(Configurable):
    """Writes completions with a Hugging Face causal language model.

    A recorded log-probability is the one that the token was drawn with. It agrees with the training forward pass to 5e-5 nats
    in float32, and to 0.15 (0.005 on average) where either computes in bfloat16.

    Args:
        temperature: divides the logits before sampling; 0 takes the likeliest token. Anything but 1 makes the completions
            off-policy for an objective at temperature 1.
        top_p: sample from the smallest set of tokens with at least this mass; 1 keeps all.
        top_k: sample from this many likeliest tokens; 0 keeps all.
        max_new_tokens: longest completion; a longer one is cut and counts as truncated.
        batch_size: rows decoded together; as rows end, waiting prompts take their place.
        engine: ``auto`` computes models of the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3) with a decoder of our own,
            after proving at first use that it gives the model's logits, and any other model with transformers; in float32,
            and in bfloat16 on a CPU that multiplies it, the decoder's steps are C functions, built once if there is a C
            compiler. ``torch`` does without these, ``transformers`` without the decoder.

    Raises:
        ValueError: for a value out of range.
    """

    foreign: bool = False
    """Whether another engine writes, whose log-probabilities differ from the trainer's by more than rounding."""
    measured: Mapping[str, float] = MappingProxyType({})
    """What a refresh adds to the log."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        engine: str = "auto",
    ) -> None:
        for name, value, fits, allowed in (
            ("temperature", temperature, temperature >= 0.0, "at least 0"),
            ("top_p", top_p, 0.0 < top_p <= 1.0, "in (0, 1]"),
            ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("engine", engine, engine in ("auto", "torch", "transformers"), "auto, torch or transformers"),
        ):
            if not fits:
                raise ValueError(f"sampler.{name}={value}: must be {allowed}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_new_tokens, self.batch_size, self.engine = max_new_tokens, batch_size, engine

    def check(self) -> None:
        """Refuse what cannot write, before any weight is loaded. Called on all ranks."""

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        vocabulary: Vocabulary,
        policy_step: int,
        on_progress: Callable[[int], None] | None = None,
        media: Sequence[Media | None] = (),
    ) -> list[Completion]:
        """Continue every prompt.

        Args:
            model: the writer, in eval mode, with whole weights.
            prompts: token ids.
            seeds: one a prompt.
            vocabulary: its end tokens close a completion, its padding rows are never sampled.
            policy_step: recorded in the completions.
            on_progress: called with the number of rows finished so far.
            media: what each prompt shows; empty for text alone.
        """
        if not prompts:
            return []
        rows, texts = min(self.batch_size, len(prompts)), [tuple(p) for p in prompts]
        engine = engine_for(model, self.engine, vocabulary, texts, rows, self.max_new_tokens)
        shown = list(media) or [None] * len(prompts)
        written = self._decode(engine, texts, shown, seeds, vocabulary, next(model.parameters()).device, on_progress)
        if bool(written[1].isnan().any()):
            raise FloatingPointError(
                "the writer's logits are not numbers: its weights hold NaN or infinity. Go on from an earlier checkpoint with "
                "a smaller model.optimizer.init_args.lr, or with trainer.gradient_clip_val"
            )
        return [
            Completion(tuple(ids[:n]), tuple(logprobs[:n]), ended, policy_step)
            for ids, logprobs, n, ended in zip(*(column.tolist() for column in written), strict=True)
        ]

    def _decode(
        self,
        engine: Engine,
        prompts: list[tuple[int, ...]],
        media: list[Media | None],
        seeds: Sequence[int],
        vocabulary: Vocabulary,
        device: torch.device,
        on_progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and log-probabilities (prompts, max_new_tokens), lengths and ends (prompts,) of all completions."""
        law = Law(self.temperature, self.top_p, self.top_k, functions=self.engine != "torch")
        randoms = uniforms(list(seeds), self.max_new_tokens).to(device)
        ends = torch.zeros(vocabulary.size, dtype=torch.bool, device=device)
        ends[[i for i in vocabulary.eos_ids if 0 <= i < vocabulary.size]] = True
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        closed = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        # equal prompts lie next to each other, so they are read once, and prompts of one length are read together
        waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        rows, written, newest = (lengths[:0] for _ in range(3))
        longest = 0  # of those that are being written
        steps: list[tuple[Tensor, ...]] = []  # rows, places, tokens and log-probabilities
        while waiting or len(rows):
            free = self.batch_size - len(rows)
            if waiting and (not len(rows) or (engine.refills and free >= REFILL_AT * self.batch_size)):
                joining, waiting = waiting[:free], waiting[free:]
                engine.admit([prompts[i] for i in joining], [media[i] for i in joining])
                rows = torch.cat([rows, torch.tensor(joining, device=device)])
                written = torch.cat([written, lengths.new_zeros(len(joining))])
                newest = torch.cat([newest, torch.tensor([prompts[i][-1] for i in joining], device=device)])
            following = torch.arange(min(AT_ONCE, self.max_new_tokens - longest), device=device)
            drawn, recorded = engine.run(newest, law, randoms[rows[:, None], written[:, None] + following], ends)
            newest, count = drawn[:, -1], drawn.shape[1]
            places = written[:, None] + following[:count]
            steps.append((rows.repeat_interleave(count), places.flatten(), drawn.flatten(), recorded.flatten()))
            written, longest = written + count, longest + count
            over = ended = ends[newest]
            if longest == self.max_new_tokens:
                over = ended | (written == longest)
            if bool(over.any()):
                closed[rows[ended]] = True
                lengths[rows] = written
                kept = _closed_up(~over)
                engine.keep(kept)
                rows, written, newest = rows[kept], written[kept], newest[kept]
                longest = int(written.max()) if len(rows) else 0
                if on_progress:
                    on_progress(len(prompts) - len(waiting) - len(rows))
        tokens = torch.full(randoms.shape, vocabulary.pad_id, device=device)
        logprobs = torch.zeros(randoms.shape, dtype=torch.float32, device=device)
        row, place, token, logprob = (torch.cat(column) for column in zip(*steps, strict=True))
        tokens[row, place], logprobs[row, place] = token, logprob
        return tokens, logprobs, lengths, closed


def _closed_up(stays: Tensor) -> Tensor:
    """Which row takes each place when some leave: the last ones fill the gaps, all others stay where they are.

    >>> _closed_up(torch.tensor([True, False, True, False, True])).tolist()
    [0, 4, 2]
    """
    count = int(stays.sum())
    order = torch.arange(count, device=stays.device)
    order[~stays[:count]] = stays[count:].nonzero().squeeze(-1) + count
    return order
