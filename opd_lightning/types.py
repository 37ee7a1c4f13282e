"""The records that travel through a distillation run.

One alignment rule holds everywhere: position ``t`` of a ``(B, T)`` tensor scores the token ``ids[:, t + 1]``, with
``T = L - 1``. Rows are padded on the right. Records are frozen; `Rollout.to` and `Rollout.select` return new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from opd_lightning.media import Media, Shown, joined, mapped, plain, unplain
from opd_lightning.ops import masks

NOT_A_STUDENT = -1
"""`Rollout.policy_step` of a completion that the student did not write."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized for everybody who reads it.

    Attributes:
        index: line of the prompt set; the key for graders and per-prompt statistics.
        text: what a person reads.
        ids: the student's tokens, ready to be continued.
        teacher_ids: the teacher's tokens where its context differs (privileged information), else None.
        reference: tokens of the data set's own completion, EOS included, where there is one.
        fields: the other columns of the row (answer, metadata), for graders.
        row: number of the rollout to be written for it, counted over the whole run. Seeds and ownership follow from it.
        informed: False where the teacher's context should say more and cannot for this row: it is not trained on.
        media: what the student's processor made of the prompt's images; None for text alone.
        teacher_media: what the teacher's made of them, where it has tokens of its own.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...] | None = None
    reference: tuple[int, ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    row: int = 0
    informed: bool = True
    media: Media | None = None
    teacher_media: Media | None = None

    @property
    def for_teacher(self) -> tuple[tuple[int, ...], Media | None]:
        """What the teacher reads and looks at."""
        return (self.ids, self.media) if self.teacher_ids is None else (self.teacher_ids, self.teacher_media)


@dataclass(frozen=True)
class Completion:
    """What a source wrote behind one prompt.

    Attributes:
        ids: tokens, the closing EOS included.
        logprobs: log-probability of every token under the law that drew it (after temperature, top-p, top-k); NaN
            where that law is unknown.
        ended: True if it closed with EOS, False if it ran into the length limit.
        policy_step: optimizer step of the student that wrote it; `NOT_A_STUDENT` for any other writer.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    policy_step: int


def _pad(rows: Tensor, width: int) -> Tensor:
    """The second dimension filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 2) + (0, width - rows.shape[1]))


@dataclass(frozen=True)
class Rendering:
    """Right-padded token rows with the positions that score completion tokens.

    Attributes:
        ids: (B, L).
        lengths: (B,) tokens that exist in each row.
        mask: (B, T) True where the target is a trainable completion token.
        route: (B,) number of the teacher that answers for the row, where several share the work; None elsewhere.
        media: one a row, what the model looks at; None where all rows are text alone.
    """

    ids: Tensor
    lengths: Tensor
    mask: Tensor
    route: Tensor | None = None
    media: Shown | None = None

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, media: Shown = ()
    ) -> Rendering:
        """Join prompts and completions row by row."""
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        length = max(2, max(map(len, rows), default=2))
        ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows], dtype=torch.long)
        ids = ids.reshape(len(rows), length)
        starts = torch.tensor([len(p) for p in prompts], dtype=torch.long)
        sizes = torch.tensor([len(c) for c in completions], dtype=torch.long)
        mask = masks.completion_mask(starts, sizes, length)
        return cls(ids, starts + sizes, mask, media=media if any(media) else None)

    def map(self, fn: Any) -> Rendering:
        route = None if self.route is None else fn(self.route)
        return Rendering(fn(self.ids), fn(self.lengths), fn(self.mask), route, mapped(self.media, fn))

    def select(self, index: Tensor) -> Rendering:
        """Some rows, cut to the longest of them."""
        lengths = self.lengths[index]
        longest = max(2, int(lengths.max())) if len(lengths) else 2
        route = None if self.route is None else self.route[index]
        media = None if self.media is None else tuple(self.media[i] for i in index.tolist())
        return Rendering(self.ids[index, :longest], lengths, self.mask[index, : longest - 1], route, media)

    @classmethod
    def cat(cls, parts: Sequence[Rendering]) -> Rendering:
        """Rows below each other, padded to the longest. The padding is never read."""
        longest = max(p.ids.shape[1] for p in parts)
        ids = torch.cat([_pad(p.ids, longest) for p in parts])
        routes = [p.route for p in parts if p.route is not None]
        return cls(
            ids,
            torch.cat([p.lengths for p in parts]),
            torch.cat([_pad(p.mask, longest - 1) for p in parts]),
            torch.cat(routes) if routes else None,
            joined([(len(p.ids), p.media) for p in parts]),
        )

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        flat = {f.name: t.cpu() if isinstance(t := getattr(self, f.name), Tensor) else t for f in fields(self)}
        return {**flat, "media": plain(self.media)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rendering:
        """Inverse of `state`."""
        return cls(**{**state, "media": unplain(state.get("media"))})

    @property
    def targets(self) -> Tensor:
        """(B, T) the token that each position scores."""
        return masks.targets(self.ids)


@dataclass(frozen=True)
class Rollout:
    """Prompts with their completions, and everything a loss may ask about them.

    Attributes:
        text: what the student scores.
        sampler_logprobs: (B, T) recorded log-probability of each completion token under the law that drew it; NaN where
            unknown, 0 outside the completion.
        row: (B,) number of the rollout, counted over the whole run.
        prompt_index: (B,) line of the prompt set.
        policy_step: (B,) optimizer step of the student that wrote it, or `NOT_A_STUDENT`.
        ended: (B,) closed with EOS; False means cut by the length limit.
        teacher_text: what the teacher scores where its prompt or its tokenizer differs from the student's. As many positions
            are scored in each row, in the same order.
        scale: factors, one a term of the objective, that turn "sum over this micro-batch" into "mean over the optimizer
            step, all micro-batches, all ranks", whatever Lightning (accumulation) and DDP (averaging) divide by. Empty
            asks the objective to normalise by this batch alone.
        group_size: rollouts of a prompt; rows are numbered prompt by prompt.
        top_ids: (B, T, K) the student's likeliest tokens when the text was written, likeliest first; None if not recorded.
        outcome: (B,) grade of each completion in [0, 1]; None if nobody graded.
        unaligned: (B, T) completion tokens that the masks leave out, because no token of a teacher with another tokenizer
            begins where they do; None if both read the same tokens.
    """

    text: Rendering
    sampler_logprobs: Tensor
    row: Tensor
    prompt_index: Tensor
    policy_step: Tensor
    ended: Tensor
    teacher_text: Rendering | None = None
    scale: tuple[float, ...] = ()
    group_size: int = 1
    top_ids: Tensor | None = None
    outcome: Tensor | None = None
    unaligned: Tensor | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt], completions: Sequence[Completion], pad_id: int) -> Rollout:
        """Join prompts with what was written behind them."""
        texts = [c.ids for c in completions]
        text = Rendering.of([p.ids for p in prompts], texts, pad_id, tuple(p.media for p in prompts))
        teacher_text = None
        if any(p.teacher_ids is not None for p in prompts):
            theirs, shown = zip(*(p.for_teacher for p in prompts), strict=True)
            teacher_text = Rendering.of(theirs, texts, pad_id, shown)
        recorded = torch.zeros(text.mask.shape)
        recorded[text.mask] = torch.tensor([lp for c in completions for lp in c.logprobs], dtype=torch.float32)
        return cls(
            text=text,
            sampler_logprobs=recorded,
            row=torch.tensor([p.row for p in prompts], dtype=torch.long),
            prompt_index=torch.tensor([p.index for p in prompts], dtype=torch.long),
            policy_step=torch.tensor([c.policy_step for c in completions], dtype=torch.long),
            ended=torch.tensor([c.ended for c in completions], dtype=torch.bool),
            teacher_text=teacher_text,
        )

    @classmethod
    def cat(cls, parts: Sequence[Rollout]) -> Rollout:
        """Rows of several rollouts below each other, padded to the longest."""
        longest = max(p.text.ids.shape[1] for p in parts)
        recorded = [_pad(p.sampler_logprobs, longest - 1) for p in parts]
        apart = any(p.teacher_text is not None for p in parts)  # beside them, parts whose rows nobody tells more about
        top_ids = [_pad(p.top_ids, longest - 1) for p in parts if p.top_ids is not None]
        outcome = [p.outcome for p in parts if p.outcome is not None]
        unaligned = [_pad(p.unaligned, longest - 1) for p in parts if p.unaligned is not None]
        flat = {n: torch.cat([getattr(p, n) for p in parts]) for n in ("row", "prompt_index", "policy_step", "ended")}
        return cls(
            text=Rendering.cat([p.text for p in parts]),
            sampler_logprobs=torch.cat(recorded),
            teacher_text=Rendering.cat([p.for_teacher for p in parts]) if apart else None,
            scale=parts[0].scale,
            group_size=parts[0].group_size,
            top_ids=torch.cat(top_ids) if top_ids else None,
            outcome=torch.cat(outcome) if outcome else None,
            unaligned=torch.cat(unaligned) if unaligned else None,
            **flat,
        )

    def __len__(self) -> int:
        return len(self.row)

    @property
    def mask(self) -> Tensor:
        """(B, T) True where a completion token is scored."""
        return self.text.mask

    @property
    def written(self) -> Tensor:
        """(B, T) True at every completion token, scored or not scored for want of a teacher's position."""
        return self.mask if self.unaligned is None else self.mask | self.unaligned

    @property
    def group(self) -> Tensor:
        """(B,) number of the group: the rollouts of one prompt, written together."""
        return self.row // self.group_size

    @property
    def for_teacher(self) -> Rendering:
        """What the teacher scores, with the route of every row."""
        return self.teacher_text or self.text

    def routed(self, route: Tensor) -> Rollout:
        """The same with a teacher's number for every row."""
        teacher_text = self.teacher_text and replace(self.teacher_text, route=route)
        return replace(self, text=replace(self.text, route=route), teacher_text=teacher_text)

    def without(self, rows: Tensor) -> Rollout:
        """The same with no token of some rows (B,) to be trained on."""
        text, theirs = self.text, self.teacher_text
        return replace(
            self,
            text=replace(text, mask=text.mask & ~rows[:, None]),
            teacher_text=theirs and replace(theirs, mask=theirs.mask & ~rows[:, None]),
        )

    def map(self, fn: Any) -> Rollout:
        """Apply ``fn`` to every tensor."""
        changed: dict[str, Any] = {
            f.name: value.map(fn) if isinstance(value, Rendering) else fn(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (Rendering, Tensor))
        }
        return replace(self, **changed)

    def to(self, *args: Any, **kwargs: Any) -> Rollout:
        return self.map(lambda x: x.to(*args, **kwargs))

    def select(self, index: Tensor) -> Rollout:
        """Some rows, cut to the longest of them."""
        text = self.text.select(index)
        return Rollout(
            text=text,
            sampler_logprobs=self.sampler_logprobs[index, : text.mask.shape[1]],
            row=self.row[index],
            prompt_index=self.prompt_index[index],
            policy_step=self.policy_step[index],
            ended=self.ended[index],
            teacher_text=self.teacher_text.select(index) if self.teacher_text else None,
            scale=self.scale,
            group_size=self.group_size,
            top_ids=self.top_ids[index, : text.mask.shape[1]] if self.top_ids is not None else None,
            outcome=self.outcome[index] if self.outcome is not None else None,
            unaligned=self.unaligned[index, : text.mask.shape[1]] if self.unaligned is not None else None,
        )

    def completion(self, b: int) -> list[int]:
        """Completion tokens of row ``b``, EOS included."""
        return self.text.targets[b][self.written[b]].tolist()

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("text", "teacher_text"):
            flat[key] = flat[key] and flat[key].state()
        return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in flat.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        """Inverse of `state`."""
        nested = {k: state[k] and Rendering.from_state(state[k]) for k in ("text", "teacher_text")}
        return cls(**{**state, **nested})


@runtime_checkable
class TokenLaws(Protocol):
    """The next-token laws of one model at N scored tokens, of which a few exist at a time.

    Whoever makes them (a model, a table, a server) and whoever compares them (an objective) share only this.
    """

    def __len__(self) -> int: ...

    @property
    def vocab(self) -> int:
        """Entries of every law; rows of a padded vocabulary that carry no token are not among them."""

    def logits(self, start: int, stop: int) -> Tensor:
        """(stop - start, V) unnormalised, in the model's dtype or wider."""


@dataclass(frozen=True)
class TableLaws:
    """Laws that are given as logits (N, V). See `TokenLaws`."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    @property
    def vocab(self) -> int:
        return self.table.shape[1]

    def logits(self, start: int, stop: int) -> Tensor:
        return self.table[start:stop]


TOP = "top/"
"""Begins the names of measurements that are made at watched tokens alone."""


@dataclass(frozen=True)
class Watch:
    """Which tokens of a micro-batch are looked at more closely.

    Attributes:
        tokens: (n,) their places among the scored tokens, flattened row by row, ascending.
        k: size of the top-k sets that are kept of both models.
    """

    tokens: Tensor
    k: int


@dataclass(frozen=True)
class TokenStats:
    """Detached per-token measurements of one micro-batch, flattened over its N completion tokens.

    Attributes:
        position: (N,) index within the completion, from 0.
        values: one (N,) tensor a name, e.g. ``reverse_kl``, ``student_entropy``. Units are nats where nothing is said.
        likeliest: of the n watched tokens (n, k): ``student_ids``, ``student_logprobs``, and the teacher's where it was asked,
            likeliest first. Empty where nobody watches.
    """

    position: Tensor
    values: dict[str, Tensor]
    likeliest: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: scalar to minimise.
        token_loss: (B, T) detached contribution of each position before reduction.
        stats: detached measurements.
        advantages: (terms, 2) sum and number of each term's advantages before its baseline, for baselines that remember.
    """

    loss: Tensor
    token_loss: Tensor
    stats: TokenStats
    advantages: Tensor | None = None
