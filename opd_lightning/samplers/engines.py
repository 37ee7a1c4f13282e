"""What runs the network for the sampler: our own decoder where it is proven, transformers' forward pass everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import DynamicCache

from opd_lightning import parallel
from opd_lightning.media import Media
from opd_lightning.models.lora import adapters_at_work, base_of
from opd_lightning.models.processors import looks
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.samplers import compiled, stepped
from opd_lightning.samplers.decoder import Decoder, TooLong, UnknownArchitecture, Weights, expect_known, expect_short
from opd_lightning.samplers.drawing import Law, Writing
from opd_lightning.samplers.looking import LookingEngine

PROOF = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest root-mean-square deviation of the decoder's logits from the model's own, in standard deviations of the latter.
Measured on SmolLM2, whole and half of it: 1e-5 in float32; in bfloat16 0 (the same bits) without adapters and 0.05 to 0.08 with
merged ones, as far as transformers' own bfloat16 is from its float32. Without rotary positions it is 1.2, with 1.5 times the
attention scale and 3 times the rotary base 0.3."""


class Engine(Protocol):
    """Rows of tokens that are continued one token a step."""

    refills: bool
    """New rows may join while others are being written."""

    def admit(self, prompts: Sequence[tuple[int, ...]], media: Sequence[Media | None] = ()) -> None:
        """Append rows; the last token of each is left for the next step. What they show is for engines that look."""

    def run(self, ids: Tensor, law: Law, uniforms: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """See `Writing.run`."""
        ...

    def keep(self, kept: Tensor) -> None:
        """Row j becomes what row ``kept[j]`` is; rows that are not named are dropped."""


class TransformersEngine(Writing):
    """The model's own forward pass with its own cache; prompts are padded on the left."""

    refills = False

    def __init__(self, base: Any, pad_id: int) -> None:
        self.base, self.pad_id, self.device = base, pad_id, next(base.parameters()).device
        self.pending: Tensor | None = None

    def admit(self, prompts: Sequence[tuple[int, ...]], media: Sequence[Media | None] = ()) -> None:
        longest = max(map(len, prompts))
        self.pending = torch.tensor([[self.pad_id] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        starts = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        self.mask = (torch.arange(longest, device=self.device) >= starts[:, None]).long()
        self.cache = DynamicCache(config=self.base.config)

    def step(self, ids: Tensor) -> Tensor:
        if self.pending is not None:
            new, self.pending = self.pending, None
        else:
            new, self.mask = ids[:, None], torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], -1)
        out = self.base(
            input_ids=new,
            attention_mask=None if bool(self.mask.all()) else self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, kept: Tensor) -> None:
        if len(kept):
            self.mask = self.mask[kept]
            self.cache.batch_select_indices(kept)


@dataclass(frozen=True)
class Setting:
    """What a proof holds for: the precision, the device, the adapters at work, and the engine that is asked for."""

    dtype: torch.dtype
    device: torch.device
    adapters: frozenset[tuple[object, ...]]
    kind: str

    @classmethod
    def of(cls, base: nn.Module, kind: str) -> Setting:
        first = next(base.parameters())
        mixed = torch.is_autocast_enabled(first.device.type) and first.dtype != torch.float64
        dtype = torch.get_autocast_dtype(first.device.type) if mixed else first.dtype
        return cls(dtype, first.device, adapters_at_work(base), kind)


@dataclass
class Memory:
    """What is kept of a model between two refreshes: decoders that were proven, or the reasons against them; whether long rows
    were reported; room for the weights.
    """

    verdicts: dict[Setting, type[Decoder] | str] = field(default_factory=dict)
    too_long: bool = False
    weights: Weights | None = None


_MEMORY: WeakKeyDictionary[nn.Module, Memory] = WeakKeyDictionary()


def engine_for(
    model: nn.Module, kind: str, vocabulary: Vocabulary, prompts: Sequence[tuple[int, ...]], rows: int, new: int
) -> Engine:
    """The fastest engine that is known to compute what the model computes. It holds the weights of this moment.

    Args:
        model: the writer, in eval mode, with whole weights.
        kind: ``auto``; ``torch`` for no compiled functions; ``transformers`` for the model's own forward pass.
        vocabulary: how many ids carry a token, and one that pads.
        prompts: what will be written behind.
        rows: most rows at a time.
        new: most tokens behind a prompt.
    """
    base: Any = base_of(model)
    if kind == "transformers":
        return _by_transformers(base, vocabulary)
    longest = max(map(len, prompts))
    memory, setting = _MEMORY.setdefault(base, Memory()), Setting.of(base, kind)
    kept, memory.weights = memory.weights, None
    known = memory.verdicts.get(setting)
    try:
        if isinstance(known, str):
            raise UnknownArchitecture(known)
        if known is None:
            expect_known(base)
        expect_short(base, longest + new)
        decoder = known or _fastest(base, setting, vocabulary.size)
        wanted = setting.dtype, setting.device, decoder.packs
        fits = kept is not None and (kept.dtype, kept.embedding.device, kept.packs) == wanted
        weights = kept if kept is not None and fits else Weights(base, setting.dtype, decoder.packs)
        weights.load(base, vocabulary.size)
        if known is None:
            prove(base, decoder, weights, vocabulary.size)
            memory.verdicts[setting] = decoder
    except UnknownArchitecture as difference:
        passing = isinstance(difference, TooLong)
        if not isinstance(known, str) and not (passing and memory.too_long):
            rank_zero_info(f"sampler: {type(base).__name__} is run by transformers, slower than our decoder ({difference})")
        memory.too_long |= passing
        if not passing:
            memory.verdicts[setting] = str(difference)
        return _by_transformers(base, vocabulary)
    # a CPU hands out fresh memory page by page, which takes longer than filling it; a sharded model must not leave a whole copy
    if setting.device.type == "cpu" and not parallel.is_cut(base):
        memory.weights = weights
    return decoder(base, weights, rows, longest, longest + new)


def _fastest(base: Any, setting: Setting, vocab: int) -> type[Decoder]:
    if setting.kind == "auto" and compiled.computes(base, setting.dtype, vocab):
        return compiled.CompiledDecoder
    if setting.kind == "auto" and stepped.computes(base, setting.dtype, vocab):
        return stepped.StepDecoder
    return Decoder


def _by_transformers(base: Any, vocabulary: Vocabulary) -> Engine:
    return LookingEngine(base, vocabulary) if looks(base.config) else TransformersEngine(base, vocabulary.pad_id)


def prove(base: Any, kind: type[Decoder], weights: Weights, vocab: int) -> None:
    """A decoder must give the model's own logits: rows of unequal length, prompts read ahead, then a few tokens one by one.
    Both multiply float32 as such: what a run allows itself (`trainer.float32_matmul`) may round as bfloat16 does.

    Raises:
        UnknownArchitecture: with the deviation, if it is larger than rounding explains.
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        deviation = _deviation(base, kind, weights, vocab)
    finally:
        torch.set_float32_matmul_precision(allowed)
    if not deviation <= PROOF[weights.dtype]:
        raise UnknownArchitecture(f"its logits differ by {deviation:.2g} of their spread")


@torch.no_grad()
def _deviation(base: Any, kind: type[Decoder], weights: Weights, vocab: int) -> float:
    rows = [[(7 * i + 3) % vocab for i in range(9)], [(11 * i + 1) % vocab for i in range(6)]]
    decoder = kind(base, weights, len(rows), 9, 9)
    decoder.admit([tuple(row[:-3]) for row in rows])
    steps = [torch.tensor([row[t] for row in rows], device=decoder.device) for t in range(-4, -1)]
    found = torch.stack([decoder.step(ids) for ids in steps], 1).double()
    texts = [torch.tensor([row[:-1]], device=decoder.device) for row in rows]
    expected = torch.stack([base(input_ids=text, use_cache=False).logits[0, -3:, :vocab] for text in texts]).double()
    return float((found - expected).square().mean().sqrt() / expected.std(-1).mean())
