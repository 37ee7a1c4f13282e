"""A decoder over a line of segments: transformers' own forward with an attention implementation that knows layouts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opd_lightning.models.packing import FULL_ENOUGH, MULTIPLE, WORTH_SHARING, Call, Layout, lay_out
from opd_lightning.ops import packed
from opd_lightning.ops.attention import CausalAttention
from opd_lightning.ops.masks import flatten_completions
from opd_lightning.types import Rendering

NAME = "opd_packed"
"""How the configuration of a decoder calls this implementation: ``sdpa``, which also knows layouts."""

SHORT, SHORT_WITH_GRADIENT = 256, 768
"""Longest rows that attend by C functions in bfloat16. Where a processor has tiles, PyTorch multiplies them forwards: with
192 tokens it takes as long, with 1024 half of the time. Its backward pass is the slower one up to 1024."""

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures add to their attention scores; here it would be lost."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    opd_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside each row of the layout; without a layout, transformers' own ``sdpa``.

    Args:
        module: the attention layer.
        query: (1, heads, M, d) of the whole line.
        key: (1, key heads, M, d).
        value: (1, key heads, M, d').
        attention_mask: unread where there is a layout.
        dropout: probability.
        scaling: of the scores; None is ``d ** -0.5``.
        opd_layout: where the segments are.

    Returns:
        (1, M, heads, d'), and None for the weights, which never exist.

    Raises:
        NotImplementedError: if the layer asks for scores that are not scaled products.
    """
    if opd_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[return-value]
    added = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if added or kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{type(module).__name__} is not plain causal attention ({', '.join(added) or 'not causal'})")
    line = [x[0].transpose(0, 1) for x in (query, key, value)]  # (M, heads, d)
    if not dropout and _fits_functions(line, opd_layout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return packed.packed_attention(line[0], line[1], line[2], opd_layout.segments, scale)[None], None
    calls = opd_layout.calls
    sizes = [stop - start for start, stop in (c.span for c in calls)]
    rest = len(line[0]) - sum(sizes)
    parts = [x.split([*sizes, rest]) for x in line]
    seen = [_Line([c.span[0] for c in calls], x) for x in parts[1:]]
    *own, _ = zip(*parts, strict=True)
    out = [_attend(call, x, seen, dropout, scaling) for call, x in zip(calls, own, strict=True)]
    if rest:
        out.append(value.new_zeros(rest, *out[0].shape[1:]))
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _fits_functions(line: Sequence[Tensor], layout: Layout) -> bool:
    """Whether the C functions are the faster ones: there is work for all threads, and rows are short if they are bfloat16."""
    if not packed.computes(line[0], line[1], line[2]):
        return False
    segments = layout.segments
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in line)
    fits = line[0].dtype == torch.float32 or segments.longest <= (SHORT_WITH_GRADIENT if learns else SHORT)
    return fits and len(segments.table) * line[1].shape[1] >= torch.get_num_threads()


@dataclass(frozen=True)
class _Line:
    """The tokens of all calls, call by call: what is cut from one costs a backward pass of its length, not of the line's."""

    starts: Sequence[int]
    parts: Sequence[Tensor]

    def cut(self, start: int, stop: int) -> Tensor:
        at = bisect_right(self.starts, start) - 1
        return self.parts[at][start - self.starts[at] : stop - self.starts[at]]


def _attend(call: Call, own: Sequence[Tensor], line: Sequence[_Line], dropout: float, scaling: float | None) -> Tensor:
    """(own tokens, heads, d) of the segments of one call, from their own queries, keys and values and all keys and values."""
    queries, *seen = (_rows(x, call) for x in own)
    keys, values = (_with_context(x, whole, call) for x, whole in zip(seen, line, strict=True))
    grouped = queries.shape[1] != keys.shape[1]
    if grouped and call.mask is not None and not queries.is_cpu:  # on a GPU, groups with a mask end in the slow kernel
        keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], 1) for x in (keys, values))
        grouped = False
    states: Tensor
    if queries.is_cpu and queries.dtype == torch.bfloat16 and not dropout:
        states = CausalAttention.apply(queries, keys, values, queries.shape[-1] ** -0.5 if scaling is None else scaling)
    else:
        states = scaled_dot_product_attention(
            queries, keys, values, call.mask, dropout, is_causal=call.mask is None, scale=scaling, enable_gqa=grouped
        )
    out = states.transpose(1, 2).flatten(0, 1)
    return out if call.unpad is None else out.index_select(0, call.unpad)


def _rows(x: Tensor, call: Call) -> Tensor:
    """(rows, heads, length, d) of the call's own tokens. Padding stands behind a row's tokens, which never look at it."""
    x = x if call.pad is None else x.index_select(0, call.pad)
    return x.view(call.rows, call.length, *x.shape[1:]).transpose(1, 2)


def _with_context(own: Tensor, line: _Line, call: Call) -> Tensor:
    """(rows, heads, context + length, d)."""
    before = [line.cut(*span).transpose(0, 1).expand(call.rows, -1, -1, -1) for span in call.context]
    return torch.cat([*before, own], 2) if before else own


def completion_states(decoder: Any, text: Rendering) -> Tensor:
    """(N, D) hidden states at the completion tokens of right-padded rows, row by row.

    Without `opd_lightning.models.distributions.pack_rows`, and for rows longer than an attention window, whole rows pass the
    decoder: padding stands behind every real token, so causal attention never sees it and no attention mask is needed.
    """
    if _packs(decoder, text):
        worth, half = None if _draws(decoder) else WORTH_SHARING, _is_bfloat16(decoder, text.ids.device.type)
        programs = text.ids.is_cpu and (half or torch.get_float32_matmul_precision() != "highest")
        return line_states(decoder, _laid_out(text, worth, FULL_ENOUGH if half else None, MULTIPLE if programs else 1))
    return flatten_completions(decoder(input_ids=text.ids, use_cache=False).last_hidden_state, text.mask)


_LAID_OUT = WeakIdKeyDictionary()
"""Layouts of the texts that are alive: student and teacher mostly read the same one."""


@torch.inference_mode(False)  # what is made for a teacher also serves the student's graph
def _laid_out(text: Rendering, *how: Any) -> Layout:
    layouts: dict[tuple[Any, ...], Layout] = _LAID_OUT.setdefault(text, {})
    if how not in layouts:
        layouts[how] = lay_out(text, *how)
    return layouts[how]


def line_states(decoder: Any, layout: Layout) -> Tensor:
    """(N, D) hidden states at the scored positions of a layout."""
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.ids.device)  # without it, a mask of M x M would be made
    out = decoder(
        input_ids=layout.ids,
        position_ids=layout.positions,
        attention_mask=unread,
        use_cache=False,
        opd_layout=layout,  # a keyword reaches the layers, also when gradient checkpointing runs them again
    )
    states: Tensor = out.last_hidden_state[0].index_select(0, layout.scored)
    return states


def window_of(decoder: Any) -> int | None:
    """Longest row that every layer of a decoder sees as a whole; None if there is no such limit."""
    windows = (getattr(decoder.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((w for w in windows if w), default=None)


def _packs(decoder: Any, text: Rendering) -> bool:
    rows, length = text.ids.shape
    return rows > 0 and decoder.config._attn_implementation == NAME and length <= (window_of(decoder) or length)


def _is_bfloat16(decoder: Any, device: str) -> bool:
    """Whether a decoder's products are."""
    mixed = torch.is_autocast_enabled(device)
    return bool((torch.get_autocast_dtype(device) if mixed else decoder.dtype) == torch.bfloat16)


def _draws(decoder: Any) -> bool:
    """Whether a forward pass draws random numbers: then rows that share a beginning would share its draws."""
    if not decoder.training:
        return any(isinstance(m, nn.Dropout) and m.training and m.p for m in decoder.modules())
    rates = [v for k, v in vars(decoder.config).items() if "drop" in k and isinstance(v, float)]
    return any(rates) or any(isinstance(m, nn.Dropout) and m.p for m in decoder.modules())


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
