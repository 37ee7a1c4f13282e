"""Next-token laws of a causal language model, a few tokens at a time.

The decoder runs over whole rows; the head, whose output is the vocabulary, runs only over completion positions and only when
a chunk of them is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from opd_lightning.models.attention import NAME as PACKED
from opd_lightning.models.attention import completion_states, line_states, window_of
from opd_lightning.models.fusing import fuse, split
from opd_lightning.models.lora import base_of
from opd_lightning.models.packing import lay_out
from opd_lightning.models.processors import expect_shown, eyes_attached, looks, seen_states
from opd_lightning.ops.heads import Head
from opd_lightning.ops.masks import flatten_completions
from opd_lightning.types import Rendering


@dataclass(frozen=True)
class DenseLaws:
    """Hidden states (N, D) and the head that turns them into logits. See `opd_lightning.types.TokenLaws`.

    With a `Head`, an objective never holds more than a few of the logits; any other callable is applied as it is.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    vocab: int

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, start: int, stop: int) -> Tensor:
        return self.head(self.hidden[start:stop])[:, : self.vocab]


def head_of(model: nn.Module, vocab: int | None = None) -> Head:
    """Hidden states to logits, with the scale or soft-cap that some architectures apply after the matrix product.

    Args:
        model: a causal language model.
        vocab: rows that carry a token; None takes all.

    Raises:
        ValueError: if the model has no output embedding.
    """
    base: Any = base_of(model)
    module = base.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(base).__name__} has no output embedding; a causal language model is needed")
    config = base.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(module, vocab or config.vocab_size, factor, getattr(config, "final_logit_softcapping", None))


def laws_of(model: nn.Module, text: Rendering, vocab: int) -> DenseLaws:
    """Laws at the completion tokens of right-padded rows.

    Raises:
        ValueError: for a row that speaks of an image and brings none, or brings one to a model that reads text only.
    """
    base: Any = base_of(model)
    if text.media is None and not looks(base.config):
        return DenseLaws(completion_states(base.get_decoder(), text), head_of(model, vocab), vocab)
    if text.media is None:
        expect_shown(base.config, text.ids, None)
    with eyes_attached(base):
        states = completion_states(base.get_decoder(), text) if text.media is None else seen_states(base, text)
    return DenseLaws(states, head_of(model, vocab), vocab)


RANKED = 256
"""Laws that `likeliest` ranks at once: 150 MB of float32 logits for a vocabulary of 150 000."""


@torch.no_grad()
def likeliest(model: nn.Module, text: Rendering, vocab: int, k: int, rows: int) -> Tensor:
    """(B, T, k) the model's likeliest tokens at every completion token, likeliest first; 0 elsewhere, on the CPU.

    Args:
        model: in eval mode, with whole weights.
        text: on the CPU.
        vocab: rows of the head that carry a token.
        k: tokens, at most ``vocab``.
        rows: rows of one forward pass.
    """
    found = torch.zeros(*text.mask.shape, k, dtype=torch.int32)
    device = next(model.parameters()).device
    for some in torch.arange(len(text.ids)).split(rows):
        part = text.select(some)
        laws = laws_of(model, part.map(lambda x: x.to(device)), vocab)
        row, t = part.mask.nonzero(as_tuple=True)
        for tokens in torch.arange(len(laws)).split(RANKED) if len(laws) else ():
            ids = laws.logits(int(tokens[0]), int(tokens[-1]) + 1).topk(k, -1).indices
            found[some[row[tokens]], t[tokens]] = ids.int().cpu()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode again outside."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def prove_head(model: nn.Module) -> None:
    """The head applied to the decoder's hidden states must give the model's own logits. One without weights proves nothing.

    Raises:
        ValueError: for an architecture that does something else between them.
    """
    base: Any = base_of(model)
    device = next(base.parameters()).device
    if device.type == "meta":
        return
    ids = torch.arange(4, device=device)[None]
    with evaluating(model):  # dropout would differ, and take from the run's random numbers
        expected = base(input_ids=ids, use_cache=False).logits.float()
        found = head_of(model)(base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(base).__name__} transforms its logits in a way that is not known here (largest difference "
            f"{(found - expected).abs().max():.3g}); please report the architecture"
        )


def pack_rows(model: nn.Module) -> bool:
    """Let a model score completions without padding, with shared beginnings computed once and small operations fused, if that
    proves exact.

    The model then carries `PACKED` as its attention implementation. Otherwise it is left as it was, and a line says why.

    Returns:
        whether it packs.
    """
    base: Any = base_of(model)
    decoder = base.get_decoder()
    before = decoder.config._attn_implementation
    if before == PACKED:
        return True
    reason = f"its attention implementation is {before!r}, not 'sdpa'"
    if before == "sdpa":
        reason = _pack(model, decoder)
    if reason:
        split(base)
        decoder.set_attn_implementation(before)
        rank_zero_info(f"{type(base).__name__} scores padded rows: {reason}")
    elif (window := window_of(decoder)) is not None:
        rank_zero_info(f"{type(base).__name__} scores rows of more than {window} tokens padded: its attention has a window")
    return not reason


def become_packed(model: nn.Module) -> None:
    """Let a model pack without a proof: as another process has proven it."""
    base: Any = base_of(model)
    fuse(base)
    base.get_decoder().set_attn_implementation(PACKED)


@torch.no_grad()
def _pack(model: nn.Module, decoder: Any) -> str:
    """Change the decoder. Empty if packed rows then give the states that padded ones gave before, on a few tokens."""
    vocab = decoder.get_input_embeddings().num_embeddings
    begun = [i * 7 % vocab for i in range(1, 9)]
    completions = [[i * k % vocab for i in range(1, n)] for k, n in ((11, 8), (13, 6), (17, 8))]
    text = Rendering.of([begun, begun, begun[1:4]], completions, 0).map(lambda x: x.to(decoder.device))
    try:
        with evaluating(model):
            expected = flatten_completions(decoder(input_ids=text.ids, use_cache=False).last_hidden_state, text.mask)
            become_packed(model)
            found = line_states(decoder, lay_out(text, worth_sharing=1))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"a packed forward pass ends with {type(error).__name__}: {error}"
    difference = float((found - expected).norm() / expected.norm())
    allowed = torch.finfo(expected.dtype).eps ** 0.5
    return "" if difference <= allowed else f"packed states differ by {difference:.2g} (relative; {allowed:.2g} is allowed)"
