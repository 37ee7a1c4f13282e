"""A decoder for the Llama family: one preallocated key-value cache, fused projections, weights packed for the CPU.

It computes what the model computes, from the model's own weights. Rows stand at positions of their own, without padding:
a prompt is read once for all rows that continue it, and rows come and go between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from opd_lightning.media import Media
from opd_lightning.models.lora import LinearParts
from opd_lightning.samplers.drawing import Writing
from opd_lightning.samplers.linear import Linear

PREFILL_TOKENS = 8192
"""Prompt tokens read at once: enough to fill the machine, few enough for their activations to stay small."""

GROWTH = 256
"""Positions the cache has room for beyond the prompts at first; it doubles this room when a row needs more."""

PARTS: dict[str, set[str]] = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "feed-forward": {"gate_proj", "up_proj", "down_proj", "act_fn"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "decoder": {"embed_tokens", "layers", "norm", "rotary_emb"},
}
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
"""What a known architecture is made of, no more and no less; the attention may have the norms besides."""

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the configurations that were compared. SmolLM2 is a llama; SmolLM3 skips rotary positions in some layers."""


Attend = Callable[[int, Tensor, Tensor], Tensor]
"""Layer, queries (N, heads, head size), and keys with the values behind them, to what the heads read."""


class UnknownArchitecture(ValueError):
    """The model is not one that this decoder computes; the message says where it differs."""


class TooLong(UnknownArchitecture):
    """Only rows of this length are not computed."""


class Norm:
    """Root-mean-square normalisation with a weight, rounded where transformers rounds."""

    def __init__(self, module: Any) -> None:
        eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        _expect(eps is not None and {n for n, _ in module.named_parameters()} == {"weight"}, f"norm {type(module).__name__}")
        self.weight, self.eps = module.weight, torch.tensor(eps, dtype=torch.float32, device=module.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if x.dtype.itemsize <= 4 else x.float()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normal: Tensor = self.weight * (x * torch.addcmul(self.eps, size, size, value=1.0 / x.shape[-1]).rsqrt_()).to(x.dtype)
        return normal


class Layer:
    """The weights of one decoder layer, with those that read the same input joined."""

    def __init__(self, dtype: torch.dtype, packs: bool) -> None:
        self.qkv, self.out, self.gate_up, self.down = (Linear(dtype, packs) for _ in range(4))

    def load(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.head_norms = [Norm(attention.q_norm), Norm(attention.k_norm)] if hasattr(attention, "q_norm") else None
        self.act = mlp.act_fn
        self.qkv.load([_parts_of(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self.out.load([_parts_of(attention.o_proj)])
        self.gate_up.load([_parts_of(mlp.gate_proj), _parts_of(mlp.up_proj)])
        self.down.load([_parts_of(mlp.down_proj)])


class Weights:
    """What the decoder computes with. Embedding and norms are the model's own tensors, projections are copies.

    Args:
        base: a Hugging Face causal language model.
        dtype: of the projections and the cache; the residual stream has the embedding's.
        packs: whether the projections may be reordered for PyTorch.
    """

    def __init__(self, base: Any, dtype: torch.dtype, packs: bool = True) -> None:
        self.dtype, self.packs = dtype, packs
        self.layers = [Layer(dtype, packs) for _ in base.model.layers]
        self.head = Linear(dtype, packs)

    @torch.inference_mode(False)  # a caller's inference mode would leave tensors that the next refresh may not write to
    @torch.no_grad()
    def load(self, base: Any, vocab: int) -> None:
        """Read the weights, which are whole, with the adapters at work; the head without the padding rows behind ``vocab``."""
        decoder = base.model
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        with torch.autocast(self.embedding.device.type, enabled=False):
            for mine, layer in zip(self.layers, decoder.layers, strict=True):
                mine.load(layer)
            self.norm = Norm(decoder.norm)
            self.head.load([_parts_of(base.lm_head).rows(vocab)])


class Decoder(Writing):
    """Continues rows of tokens, one token a step.

    Args:
        base: the model, for what is not a weight.
        weights: of the model, loaded.
        rows: most rows at a time.
        prompt: longest prompt.
        length: longest row, completion included.
    """

    refills = True
    packs = True
    """Whether it wants its weights reordered."""

    def __init__(self, base: Any, weights: Weights, rows: int, prompt: int, length: int) -> None:
        self.weights, self.device = weights, weights.embedding.device
        attention, config = base.model.layers[0].self_attn, base.config
        self.size, self.scale = int(attention.head_dim), float(attention.scaling)
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        places = torch.arange(length, device=self.device)
        cos, sin = base.model.rotary_emb(weights.embedding[:1], places[None])
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, : self.size // 2], sin[0, :, self.size // 2 :]], -1)
        shape = (rows, 2 * self.keys, min(length, prompt + GROWTH), self.size)  # keys, then values
        self.limit, self.room = length, shape[2]
        self.cached = [torch.zeros(shape, dtype=weights.dtype, device=self.device) for _ in weights.layers]
        self.lengths: list[int] = []  # tokens of every row in the cache
        self.prompts: list[tuple[int, ...]] = []
        self.places = places[:0]  # the same as `lengths`, on the device

    # ---- rows come and go ----------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def admit(self, prompts: Sequence[tuple[int, ...]], media: Sequence[Media | None] = ()) -> None:
        """Append rows behind those that are there, and read their prompts but for the last token, which the next step takes.

        Args:
            prompts: token ids; equal prompts next to each other are read once, shorter ones first waste least.
        """
        row = len(self.prompts)
        donors = {p: i for i, p in enumerate(self.prompts)}
        self.prompts += prompts
        self.lengths += [len(p) - 1 for p in prompts]
        self.places = torch.tensor(self.lengths, device=self.device)
        self._reserve(max(self.lengths) + 1)
        waiting: list[tuple[tuple[int, ...], int, int]] = []  # prompt, first row, rows
        longest = 0  # of these
        for prompt, group in groupby(prompts):
            count = sum(1 for _ in group)
            if prompt in donors:
                self._copy(slice(donors[prompt], donors[prompt] + 1), slice(row, row + count), len(prompt) - 1)
            elif len(prompt) > 1:
                longest = max(len(prompt), longest)
                if waiting and (len(waiting) + 1) * longest > PREFILL_TOKENS:
                    self._read(waiting)
                    waiting, longest = [], len(prompt)
                waiting.append((prompt, row, count))
            row += count
        if waiting:
            self._read(waiting)

    @torch.inference_mode()
    def keep(self, kept: Tensor) -> None:
        """Row j becomes what row ``kept[j]`` is; rows that are not named are dropped."""
        order = kept.tolist()
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            to, row = torch.tensor(moved, device=self.device).T
            end = max(self.lengths[r] for _, r in moved)
            for cache in self.cached:
                cache[to, :, :end] = cache[row, :, :end]
        self.lengths = [self.lengths[r] for r in order]
        self.prompts = [self.prompts[r] for r in order]
        self.places = self.places[kept]

    def _copy(self, source: slice, target: slice, length: int) -> None:
        for cache in self.cached:
            cache[target, :, :length] = cache[source, :, :length]

    def _reserve(self, length: int) -> None:
        if length <= self.room:
            return
        old, self.room = self.room, min(self.limit, max(length, 2 * self.room))
        for i, cache in enumerate(self.cached):
            self.cached[i] = F.pad(cache, (0, 0, 0, self.room - old))

    # ---- the network ---------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """(rows, vocab) logits of the token behind ``ids`` (rows,), the newest token of every row."""
        rows, longest = len(ids), max(self.lengths) + 1
        self._reserve(longest)
        together = min(self.lengths) + 1 == longest
        here = torch.arange(rows, device=ids.device)
        mask = None
        if not together:
            hidden = torch.arange(longest, device=ids.device) > self.places[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=ids.device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None, None].expand(-1, -1, self.queries // self.keys, -1)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache = self.cached[layer]
            if together:
                cache[:rows, :, longest - 1] = kv
            else:
                cache[here, :, self.places] = kv
            keys, values = cache[:rows, :, :longest].chunk(2, 1)
            # the queries that share a key head are rows of one small matrix: keys and values are not repeated
            q = q.reshape(rows, self.keys, -1, self.size)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)

        x = self._through(ids, self.cos[self.places], self.sin[self.places], attend)
        self.lengths = [n + 1 for n in self.lengths]
        self.places = self.places + 1
        return self.weights.head(self.weights.norm(x))

    def _read(self, waiting: list[tuple[tuple[int, ...], int, int]]) -> None:
        """Fill the cache with prompts, each once, and copy it to all rows of the prompt."""
        count, longest = len(waiting), max(len(p) for p, _, _ in waiting) - 1
        ids = torch.tensor([[*p[:-1], *[0] * (longest + 1 - len(p))] for p, _, _ in waiting], device=self.device)
        rows = torch.tensor([row for _, first, n in waiting for row in range(first, first + n)], device=self.device)
        of = torch.tensor([i for i, (_, _, n) in enumerate(waiting) for _ in range(n)], device=self.device)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            q, kv = (t.unflatten(0, (count, longest)).transpose(1, 2) for t in (q, kv))
            self.cached[layer][rows, :, :longest] = kv[of]  # what lies behind a shorter prompt is masked, then overwritten
            k, v = kv.chunk(2, 1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.keys < self.queries)
            return out.transpose(1, 2)

        cos, sin = (t[:longest].repeat(count, 1) for t in (self.cos, self.sin))
        self._through(ids.flatten(), cos, sin, attend)

    def _through(self, ids: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(N, D) hidden states of N tokens at the places that ``cos`` and ``sin`` (N, head size) stand for."""
        x = F.embedding(ids, self.weights.embedding)
        count, cos, sin = len(ids), cos[:, None], sin[:, None]
        for i, layer in enumerate(self.weights.layers):
            heads = layer.qkv(layer.before_attention(x)).view(count, -1, self.size)
            turning = heads[:, : self.queries + self.keys]
            if layer.head_norms is not None:
                parts = turning.split([self.queries, self.keys], 1)
                turning = torch.cat([norm(part) for norm, part in zip(layer.head_norms, parts, strict=True)], 1)
            heads[:, : self.queries + self.keys] = _rotate(turning, cos, sin)
            mixed = attend(i, heads[:, : self.queries], heads[:, self.queries :])
            x = x + layer.out(mixed.reshape(count, -1))
            gate, up = layer.gate_up(layer.before_mlp(x)).chunk(2, -1)
            x = x + layer.down(layer.act(gate) * up)
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; ``sin`` carries the sign of the first half."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1) * sin)


def expect_known(base: Any) -> None:
    """Check that a model is one this decoder computes.

    Raises:
        UnknownArchitecture: naming the first part that is missing or unknown.
    """
    config = base.config
    _expect(config.model_type in KNOWN, f"model_type {config.model_type!r}")
    _expect({n for n, _ in base.named_children()} == {"model", "lm_head"}, f"parts of {type(base).__name__}")
    _children("decoder", base.model)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    _expect(rope in ("default", "linear", "llama3", "yarn"), f"rope_type {rope!r}")
    _parts_of(base.lm_head)
    for layer in base.model.layers:
        _children("layer", layer)
        _children("attention", layer.self_attn, optional=HEAD_NORMS)
        _children("feed-forward", layer.mlp)


def expect_short(base: Any, length: int) -> None:
    """Check that rows of ``length`` tokens are no longer than an attention window.

    Raises:
        TooLong: if they are.
    """
    window = getattr(base.config, "sliding_window", None)
    if window is not None and window < length:
        raise TooLong(f"sliding window of {window}, rows of {length} tokens")


def _children(what: str, module: Any, optional: frozenset[str] = frozenset()) -> None:
    found = {name for name, _ in module.named_children()}
    odd = (found ^ PARTS[what]) - (optional if optional <= found else frozenset())
    _expect(not odd, f"{what} with or without {', '.join(sorted(odd))}")


def _parts_of(layer: nn.Module) -> LinearParts:
    found = LinearParts.of(layer)
    if found is None:
        raise UnknownArchitecture(f"projection {type(layer).__name__}")
    return found


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise UnknownArchitecture(what)
