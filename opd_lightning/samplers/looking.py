"""Writing behind images: transformers' forward pass, with what a processor made of them in the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from opd_lightning.media import Media
from opd_lightning.models.processors import expect_shown, inputs_for, placeholders
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.samplers.drawing import Writing


class LookingEngine(Writing):
    """The model's own forward pass, with prompts padded on the left. See `opd_lightning.samplers.engines.Engine`.

    Models keep things of their own about the rows that they saw (where text goes on behind an image), so rows that have ended
    stay in the batch, unread, until all have. Tokens that stand for images are never written: a row that holds one without
    pixels could not be scored. The recorded log-probability is that of the law without them.
    """

    refills = False

    def __init__(self, base: Any, vocabulary: Vocabulary) -> None:
        self.base, self.pad_id, self.device = base, vocabulary.pad_id, next(base.parameters()).device
        self.unwritten = torch.tensor(placeholders(base.config), dtype=torch.long, device=self.device)
        self.unwritten = self.unwritten[self.unwritten < vocabulary.size]
        self.pending: Tensor | None = None
        self.behind: Tensor | int = 0

    def admit(self, prompts: Sequence[tuple[int, ...]], media: Sequence[Media | None] = ()) -> None:
        longest = max(map(len, prompts))
        starts = [longest - len(p) for p in prompts]
        self.pending = torch.tensor([[self.pad_id] * n + list(p) for n, p in zip(starts, prompts, strict=True)])
        self.pending = self.pending.to(self.device)
        self.mask = (torch.arange(longest) >= torch.tensor(starts)[:, None]).long().to(self.device)
        shown = tuple(media) or (None,) * len(prompts)
        for prompt, one in zip(prompts, shown, strict=True):  # padding may be spelt like an image
            expect_shown(self.base.config, torch.tensor([prompt]), (one,))
        self.inputs = inputs_for(self.base.base_model, shown, starts, longest)
        self.cache = DynamicCache(config=self.base.config)
        self.rows = torch.arange(len(prompts), device=self.device)  # which of the batch are still written

    def step(self, ids: Tensor) -> Tensor:
        first = self.pending is not None
        if self.pending is not None:
            new, self.pending = self.pending, None
        else:
            new = torch.full((len(self.mask), 1), self.pad_id, device=self.device)
            new[self.rows, 0] = ids
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], -1)
        out = self.base(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=self._positions(first, new.shape[1]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **(self.inputs if first else {}),
        )
        if first and self._turns_itself:
            self.behind = self.base.base_model.rope_deltas.to(self.device)
        logits: Tensor = out.logits[self.rows, -1]
        return logits.index_fill(-1, self.unwritten, -torch.inf)

    def keep(self, kept: Tensor) -> None:
        self.rows = self.rows[kept]

    @property
    def _turns_itself(self) -> bool:
        """Whether positions depend on what is shown (M-RoPE), so that only the model knows them."""
        return bool(self.inputs) and hasattr(self.base.base_model, "rope_deltas")

    def _positions(self, first: bool, count: int) -> Tensor | None:
        """(B, count) places of the newest tokens; None leaves them to the model."""
        if first:
            self.behind = 0
            if self._turns_itself:
                return None
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        return places + self.behind
