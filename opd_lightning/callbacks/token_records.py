"""TokenRecords: what both models thought at every token of a few rollouts, for the report's viewer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opd_lightning.callbacks.series import Series
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.module import OPDModule
from opd_lightning.types import NOT_A_STUDENT, ObjectiveOutput, Rendering, Rollout, Watch

Record = dict[str, Any]
VALUES = ("advantage", "reverse_kl", "student_entropy", "teacher_entropy", "logprob")
"""Statistics of the training step that are kept for every token, where the objective has them; in nats."""


class TokenRecords(pl.Callback):
    """Some rollouts of some steps token by token, as they were trained on, in ``<run>/tokens.jsonl``, a line a rollout.

    Each line holds prompt and completion, and for every token its text and id, the loss, the advantage of the drawn token
    (where the objective samples), reverse KL, both entropies, the log-probabilities of sampler, student and teacher, and both
    models' likeliest tokens with their probabilities. All of it is read off the training step's own pass. Rank zero writes its
    own rollouts, spread over their lengths; a resumed run repeats no line.

    Args:
        looks: optimizer steps that are recorded, spread evenly over ``trainer.max_steps``, the first and the last among them;
            in a run without a known end at steps 1, 2, 4, 8, ... 0 records nothing.
        rows: rollouts of a step.
        k: likeliest tokens of either model.
        tokens: of a rollout at most; what follows is left out.

    Raises:
        ValueError: for negative numbers, or rows, k or tokens below 1.
    """

    def __init__(self, looks: int = 20, rows: int = 3, k: int = 5, tokens: int = 256) -> None:
        if looks < 0 or min(rows, k, tokens) < 1:
            raise ValueError(
                f"TokenRecords(looks={looks}, rows={rows}, k={k}, tokens={tokens}): looks at least 0, the others at least 1"
            )
        self.looks, self.rows, self.k, self.tokens = looks, rows, k, tokens
        self.file = Series("tokens.jsonl")
        self._chosen: list[int] = []

    def is_due(self, step: int, last: int) -> bool:
        """Whether an optimizer step (from 1) is recorded, in a run that ends at ``last`` (-1 for an open end).

        >>> records = TokenRecords(looks=3)
        >>> [step for step in range(1, 101) if records.is_due(step, 100)], [s for s in range(1, 9) if records.is_due(s, -1)]
        ([1, 50, 100], [1, 2, 4, 8])
        """
        if self.looks == 0 or last < 1:
            return self.looks > 0 and step & (step - 1) == 0
        gaps = max(1, self.looks - 1)
        return step in {1 + (last - 1) * i // gaps for i in range(self.looks)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.looks:
            self.file.begin(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Rollout, batch_idx: int) -> None:
        assert isinstance(pl_module, OPDModule)
        self._chosen = []
        if not trainer.is_global_zero or not self.is_due(trainer.global_step + 1, trainer.max_steps):
            return
        micro = trainer.accumulate_grad_batches
        self._chosen = spread(len(batch), micro, batch_idx % micro, self.rows)
        if self._chosen:
            pl_module.watch = watch(batch, self._chosen, self.k)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OPDModule)
        pl_module.watch = None
        # The last micro-batch has closed the step, the others have not.
        micro = trainer.accumulate_grad_batches
        step = trainer.global_step + (batch_idx % micro < micro - 1)
        found = records(pl_module.vocabulary, batch, outputs["output"], self._chosen, self.tokens)
        self.file.add(trainer, [{"step": step, **record} for record in found])

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.watch = None


def spread(size: int, micro_batches: int, number: int, rows: int) -> list[int]:
    """Rows of micro-batch ``number`` that are looked at: over all of them, ``rows`` at even distances. The rollouts of a step
    are sorted by length, so that short and long ones are among them.

    >>> [spread(4, 2, number, 3) for number in (0, 1)]
    [[1], [0, 2]]
    """
    total = size * micro_batches
    places = sorted({(2 * i + 1) * total // (2 * rows) for i in range(rows)})
    return [place - number * size for place in places if number * size <= place < (number + 1) * size]


def watch(rollout: Rollout, rows: list[int], k: int) -> Watch:
    """All tokens of these rollouts."""
    chosen = torch.zeros_like(rollout.mask)
    chosen[rows] = True
    return Watch((chosen & rollout.mask)[rollout.mask].nonzero().flatten(), k)


def records(vocabulary: Vocabulary, rollout: Rollout, output: ObjectiveOutput, rows: list[int], limit: int) -> list[Record]:
    """Watched rollouts as plain data, cut to so many tokens; those without a token to be trained on are left out.

    Args:
        vocabulary: of both models.
        rollout: the micro-batch.
        output: of a pass with `OPDModule.watch` set to these rows.
        rows: which rollouts, ascending.
        limit: tokens of a rollout.
    """
    out, begin = [], 0
    ends = rollout.mask.sum(-1).cumsum(0).tolist()
    for row in rows:
        size = int(rollout.mask[row].sum())
        at = slice(ends[row] - size, ends[row])
        if size:
            likeliest = {name: law[begin : begin + size][:limit] for name, law in output.stats.likeliest.items()}
            out.append(_record(vocabulary, rollout, output, row, at, likeliest, limit))
        begin += size
    return out


def _record(
    vocabulary: Vocabulary,
    rollout: Rollout,
    output: ObjectiveOutput,
    row: int,
    at: slice,
    likeliest: dict[str, Tensor],
    limit: int,
) -> Record:
    ids, values = rollout.completion(row), output.stats.values
    kept = {name: _short(values[name][at][:limit]) for name in VALUES if name in values}
    if "k1" in values:  # log p - log q of the drawn token
        kept["teacher_logprob"] = _short((values["logprob"] - values["k1"])[at][:limit])
    kept["sampler_logprob"] = _short(rollout.sampler_logprobs[row][rollout.mask[row]][:limit])
    kept["loss"] = _short(output.token_loss[row][rollout.mask[row]][:limit])
    tops: dict[str, list[list[Any]]] = {}
    seen = set(ids[:limit])
    for name, law in likeliest.items():
        who, _, what = name.partition("_")
        if what == "ids":
            tops[f"{who}_top"] = law.tolist()
            seen |= set(law.flatten().tolist())
        else:
            tops[f"{who}_top_probs"] = [_short(x.exp(), 3) for x in law]
    prompts = {"prompt": rollout.text}
    if rollout.teacher_text is not None:
        prompts["teacher_prompt"] = rollout.teacher_text
    return {
        "row": int(rollout.row[row]),
        "prompt_index": int(rollout.prompt_index[row]),
        "writer": "student" if int(rollout.policy_step[row]) != NOT_A_STUDENT else "other",
        "policy_step": int(rollout.policy_step[row]),
        "ended": bool(rollout.ended[row]),
        **{name: vocabulary.decode(_prompt(text, row, len(ids))) for name, text in prompts.items()},
        "completion": vocabulary.decode(ids),
        "length": len(ids),
        "ids": ids[:limit],
        **kept,
        **tops,
        "pieces": {str(i): vocabulary.piece(i) for i in sorted(seen)},
    }


def _prompt(text: Rendering, row: int, completion: int) -> list[int]:
    ids: list[int] = text.ids[row, : int(text.lengths[row]) - completion].tolist()
    return ids


def _short(values: Tensor, digits: int = 4) -> list[float | None]:
    """With so many digits; None for what is not known."""
    rounded = (float(f"{x:.{digits}g}") for x in values.tolist())
    return [x if x == x and abs(x) != float("inf") else None for x in rounded]
