"""Prompts for training and for held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from opd_lightning import parallel
from opd_lightning.bars import bar
from opd_lightning.data.buffer import RolloutBuffer, RolloutLoader
from opd_lightning.data.contexts import Context
from opd_lightning.data.group_contexts import Attempt
from opd_lightning.data.images import images_of, rendered, said
from opd_lightning.data.prompts import PromptSet, Row
from opd_lightning.data.selectors import Selector, Shuffled
from opd_lightning.data.templates import AutoTemplate, Template, encoded
from opd_lightning.media import Media
from opd_lightning.metrics.graders import Grader
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.seeds import run_seed
from opd_lightning.types import Completion, Prompt, Rollout

AT_ONCE = 1000
"""Prompts that are tokenized in one call."""
SHOW_PROGRESS = 5000
"""Prompts from which on tokenizing takes long enough to be shown."""


class PromptDataModule(pl.LightningDataModule):
    """Which prompts are trained on, which are held out, and how they are cut into batches.

    Args:
        prompts: the prompt set.
        held_out: rows at the end of the set that are kept for evaluation and never trained on.
        held_out_prompts: a set of its own for evaluation, instead of ``held_out``.
        selector: order of the training prompts.
        template: renders prompts for the student.
        teacher_template: renders prompts for the teacher; null shows it what the student sees. What only this one holds is
            privileged information; a `Context` adds it to what the student sees.
        batch_size: rollouts of one optimizer step, over all devices. It stays the same on one device and on eight.
        micro_batch_size: rollouts of one forward pass on one device; 0 takes all of the device's share at once. Gradient
            accumulation follows from the two.
        max_prompt_tokens: longer prompts are left out, with a warning; 0 keeps all.
        seed: of the prompt order; null takes ``seed_everything``.

    Raises:
        ValueError: for sizes that are out of range.
    """

    def __init__(
        self,
        prompts: PromptSet,
        held_out: int = 0,
        held_out_prompts: PromptSet | None = None,
        selector: Selector = Shuffled(),
        template: Template = AutoTemplate(),
        teacher_template: Template | None = None,
        batch_size: int = 32,
        micro_batch_size: int = 0,
        max_prompt_tokens: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or micro_batch_size < 0:
            raise ValueError(
                f"data.batch_size={batch_size}, data.micro_batch_size={micro_batch_size}: the first must be at least 1, the "
                "second at least 0 (0 takes the whole share of a device)"
            )
        if held_out and held_out_prompts is not None:
            raise ValueError("give data.held_out (rows of the same set) or data.held_out_prompts (another set), not both")
        self.prompt_set, self.held_out, self.held_out_prompts = prompts, held_out, held_out_prompts
        self.selector, self.template = selector, template
        self.teacher_template = teacher_template.within(template) if teacher_template is not None else None
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.max_prompt_tokens, self.seed = max_prompt_tokens, run_seed(seed)
        self.train_prompts: list[Prompt] = []
        self.eval_prompts: list[Prompt] = []
        self.scores: list[float] | None = None
        self.buffer: RolloutBuffer | None = None
        self.total_micro_batches = 0
        self.vocabulary: Vocabulary | None = None
        self.teacher_tokenizer: PreTrainedTokenizerBase | None = None  # where it is not the student's
        self.teacher_processor: Callable[[], Any] | None = None  # the same for images; None is the student's
        self.limit_held_out: int | None = None
        self._orders: dict[int, list[int]] = {}

    # ---- preparation ---------------------------------------------------------------------------------------------------
    def setup(self, stage: str | None = None) -> None:
        if self.train_prompts or self.eval_prompts:
            return
        if self.vocabulary is None:
            if self.trainer is None:
                raise RuntimeError("outside a Trainer, set `datamodule.vocabulary` (module.vocabulary) before setup()")
            module: Any = self.trainer.lightning_module
            self.vocabulary = module.vocabulary
            if (translation := module.teacher.translation) is not None:
                self.teacher_tokenizer = translation.theirs.tokenizer
            self.teacher_processor = partial(module.teacher.processor, module.recipe)
        rows = self.prompt_set.rows()
        if self.held_out >= len(rows):
            raise ValueError(f"data.held_out={self.held_out}, but the prompt set has only {len(rows)} rows")
        cut = len(rows) - self.held_out
        held = self.held_out_prompts.rows() if self.held_out_prompts is not None else rows[cut:]
        if self.gathers and self._attempt_grader is None:
            raise ValueError(
                f"data.teacher_template {type(self.teacher_template).__name__} needs graded completions, but data.prompts has "
                "no grader: give data.teacher_template.grader"
            )
        self.train_prompts = self._tokenize(rows[:cut], 0)
        self.eval_prompts = self._tokenize(held, cut)
        if not self.train_prompts:
            raise ValueError(
                f"no training prompt is left: all {cut} are longer than data.max_prompt_tokens={self.max_prompt_tokens}"
            )

    def _tokenize(self, rows: Sequence[Row], first: int) -> list[Prompt]:
        out: list[Prompt] = []
        with bar(total=len(rows), desc="Tokenizing prompts", disable=len(rows) < SHOW_PROGRESS) as shown:
            for start in range(0, len(rows), AT_ONCE):
                some = rows[start : start + AT_ONCE]
                out += self._tokenized(some, first + start)
                shown.update(len(some))
        assert self.vocabulary is not None
        unk = self.vocabulary.unk_id
        short = [p for p in out if not self.max_prompt_tokens or len(p.ids) <= self.max_prompt_tokens]
        uninformed = sum(not p.informed for p in short)
        unknown = sum(unk in (*p.ids, *(p.teacher_ids or ()), *(p.reference or ())) for p in short)
        if uninformed and not self.gathers:
            missing = (
                f"{uninformed} of {len(rows)} rows have nothing that data.teacher_template {self.teacher_template!r} tells"
            )
            if first == 0 and uninformed == len(rows):
                raise ValueError(f"{missing}; their columns are {', '.join(rows[0])}")
            use = "they are written, but not trained on" if first == 0 else "no divergence is measured on these held-out rows"
            rank_zero_warn(f"{missing}: {use}")
        if unknown:
            rank_zero_warn(
                f"{unknown} of {len(rows)} prompts or completions hold text that the tokenizer does not know (<unk>)"
            )
        if too_long := len(out) - len(short):
            rank_zero_warn(
                f"{too_long} of {len(rows)} prompts are longer than data.max_prompt_tokens={self.max_prompt_tokens}: left out"
            )
        return short

    def _tokenized(self, rows: Sequence[Row], first: int) -> list[Prompt]:
        assert self.vocabulary is not None
        tokenizer, end = self.vocabulary.tokenizer, self.vocabulary.eos_ids[0]
        informed = [self.teacher_template is None or self.teacher_template.informed(row) for row in rows]
        given = {i: row["completion"] for i, row in enumerate(rows) if row.get("completion") is not None}
        references = dict(zip(given, encoded(list(given.values()), tokenizer), strict=True))
        out = []
        ours = rendered(self.template, rows, tokenizer, self.vocabulary.processor)
        each = zip(rows, ours, self._for_teacher(rows, informed), informed, strict=True)
        for i, (row, (ids, media), (theirs, their_media), told) in enumerate(each):
            reference = (*references[i], end) if i in references else None
            out.append(
                Prompt(
                    first + i,
                    said(row["prompt"]),
                    ids,
                    theirs,
                    reference,
                    dict(row),
                    informed=told,
                    media=media,
                    teacher_media=their_media,
                )
            )
        return out

    def _for_teacher(
        self, rows: Sequence[Mapping[str, Any]], informed: Sequence[bool]
    ) -> list[tuple[tuple[int, ...] | None, Media | None]]:
        """What the teacher reads and looks at behind each row; None where it reads what the student reads. Images pass its own
        processor.
        """
        assert self.vocabulary is not None
        tokenizer = self.teacher_tokenizer or self.vocabulary.tokenizer
        processor = self.teacher_processor or self.vocabulary.processor
        told = [i for i, knows in enumerate(informed) if knows and self.teacher_template is not None]
        rest = sorted(set(range(len(rows))) - set(told))
        if self.teacher_tokenizer is None:
            rest = [i for i in rest if self.teacher_processor is not None and images_of(rows[i]["prompt"])]
        out: list[tuple[tuple[int, ...] | None, Media | None]] = [(None, None)] * len(rows)
        for template, at in ((self.teacher_template or self.template, told), (self.template, rest)):
            for i, found in zip(at, rendered(template, [rows[i] for i in at], tokenizer, processor), strict=True):
                out[i] = found
        return out

    def some_prompts(self, count: int) -> list[Prompt]:
        """Evenly spaced training prompts, as many as there are; nothing else is tokenized."""
        rows = self.prompt_set.rows()
        rows = rows[: len(rows) - self.held_out]
        size = min(count, len(rows))
        return self._tokenize([rows[i * len(rows) // size] for i in range(size)], 0)

    def replace_prompts(self, prompts: PromptSet) -> None:
        """Use other prompts, all of them held out (for generation)."""
        self.prompt_set = self.held_out_prompts = prompts
        self.held_out = 0
        self.train_prompts, self.eval_prompts = [], []

    @property
    def grader(self) -> Grader | None:
        """The grader that belongs to the held-out set, if it has one."""
        return (self.held_out_prompts or self.prompt_set).grader()

    # ---- what the teacher is told after the group has written ------------------------------------------------------------
    @property
    def gathers(self) -> bool:
        """Whether the teacher's context is made from what the group has written."""
        return isinstance(self.teacher_template, Context) and self.teacher_template.needs_group

    @property
    def _attempt_grader(self) -> Grader | None:
        own = self.teacher_template.grader if isinstance(self.teacher_template, Context) else None
        return own or self.prompt_set.grader()

    def grades(self, prompts: Sequence[Prompt], written: Sequence[Completion], grader: Grader) -> list[float]:
        """The grade of one completion a prompt."""
        return [attempt.score for attempt in self._attempts(prompts, written, grader)]

    def _attempts(self, prompts: Sequence[Prompt], written: Sequence[Completion], grader: Grader) -> list[Attempt]:
        assert self.vocabulary is not None
        texts = [self.vocabulary.decode(c.ids) for c in written]
        of = zip(prompts, written, texts, strict=True)
        return [Attempt(p.row, text, grader({**p.fields, "ended": c.ended}, text)) for p, c, text in of]

    def inform(self, prompts: Sequence[Prompt], written: Sequence[Completion], group: int) -> list[Prompt]:
        """Prompts whose teacher context tells of their group's completions. All ranks must call it.

        Args:
            prompts: of this rank.
            written: one completion a prompt.
            group: rollouts of a prompt; those with equal ``row // group`` are siblings, on whichever rank they are.
        """
        if not self.gathers:
            return list(prompts)
        assert self.teacher_template is not None and self._attempt_grader is not None
        attempts = {attempt.row: attempt for attempt in self._attempts(prompts, written, self._attempt_grader)}
        groups: dict[int, list[Attempt]] = {}
        for attempt in sorted((a for part in parallel.gather_objects(attempts) for a in part.values()), key=lambda a: a.row):
            groups.setdefault(attempt.row // group, []).append(attempt)
        out = []
        for prompt in prompts:
            siblings = [a for a in groups[prompt.row // group] if a.row != prompt.row]
            row = {**prompt.fields, "attempt": attempts[prompt.row], "siblings": siblings}
            informed = prompt.row >= 0 and self.teacher_template.informed(row)
            ((ids, media),) = self._for_teacher([row], [informed])
            out.append(replace(prompt, teacher_ids=ids, teacher_media=media, informed=informed))
        return out

    # ---- the stream of prompts -----------------------------------------------------------------------------------------
    def prompt_at(self, position: int) -> Prompt:
        """The prompt at a place of the endless stream: a function of the seed, the selector and the place."""
        epoch, offset = 0, position
        while offset >= len(order := self._order(epoch)):
            offset -= len(order)
            epoch += 1
        return self.train_prompts[order[offset]]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders[epoch] = self.selector.order(self.train_prompts, self.scores, epoch, self.seed)
        return self._orders[epoch]

    # ---- loaders -------------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> RolloutLoader:
        if self.buffer is None:
            raise RuntimeError("PromptDataModule has no rollout buffer: RolloutRefresh must be among the callbacks")
        return RolloutLoader(self.buffer, self.total_micro_batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out prompts of this rank, the same number on every rank; a filler has row -1."""
        world, rank = parallel.world_size(), parallel.rank()
        held_out = self.eval_prompts[: self.limit_held_out]
        own = [replace(p, row=i) for i, p in enumerate(held_out) if i % world == rank]
        own += [replace(held_out[0], row=-1)] * (-(-len(held_out) // world) - len(own)) if held_out else []
        size = max(1, self.micro_batch_size or 64)
        # its own generator: iter(DataLoader) would draw from the training's random numbers
        return DataLoader(own, batch_size=size, collate_fn=list, generator=torch.Generator())  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Rollouts move; lists of prompts are no tensors."""
        return batch.to(device) if isinstance(batch, Rollout) else batch

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"]
        self._orders.clear()
