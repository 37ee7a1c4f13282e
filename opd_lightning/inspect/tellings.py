"""The floor of privileged information on a run's own data, before it is trained.

The teacher answers at the student's own states under what it is told about the row, and under what it is told about others.
If the student cannot derive from the prompt which of them it is, no training brings it below the floor of
`opd_lightning.inspect.floor`. From a few tellings the floor is estimated too low rather than too high.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from opd_lightning.data.contexts import Context
from opd_lightning.inspect.floor import LEARNABLE, Direction, floor, mean_divergence
from opd_lightning.inspect.setups import Setup
from opd_lightning.models.distributions import evaluating, laws_of
from opd_lightning.objectives import ForwardKL
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt, Rendering

__all__ = ["Estimate", "estimate"]

NUMBERS = 2**24
"""Log-probabilities of all tellings that are alive at once: 64 MiB in float32."""


@dataclass(frozen=True)
class Estimate:
    """What a student can reach, in nats a token.

    Attributes:
        title: of the context.
        instance: another information for every row.
        direction: of the KL.
        start: from the untrained student to the teacher.
        floor: below which no student can come that does not know what was told.
        rows, tellings, tokens: how many of each it was estimated from.
    """

    title: str
    instance: bool
    direction: Direction
    start: float
    floor: float
    rows: int
    tellings: int
    tokens: int

    @property
    def learnable(self) -> bool:
        return self.floor < LEARNABLE * self.start

    def __str__(self) -> str:
        """One line, as `opd pi-floor -c` and the doctor print it."""
        kind = "another telling for every row" if self.instance else "shared rule"
        return (
            f"{kind} ({self.title}): floor {self.floor:.2f} nat of {self.start:.2f}, "
            f"{'learnable' if self.learnable else 'not learnable'} ({self.direction} KL a token; {self.rows} rows, "
            f"{self.tellings} telling{'s' if self.tellings > 1 else ''} each, {self.tokens} tokens)"
        )


def estimate(setup: Setup, rows: int = 16, tellings: int = 8, tokens: int = 32) -> Estimate:
    """The floor of a configuration. Loads the weights, writes a completion a row, asks the teacher ``rows * tellings`` times.

    Args:
        setup: the run; left as it is but for its weights.
        rows: of the training set.
        tellings: the row's own and those of other rows.
        tokens: of a completion, at most.

    Raises:
        ValueError: where the teacher is told nothing, or only what its group has written.
    """
    module, data = setup.module, setup.data
    told = data.teacher_template
    if told is None or module.teacher.translation is not None:
        raise ValueError(
            "there is no floor to estimate: the teacher reads what the student reads (data.teacher_template is null)"
            if told is None
            else "the floor is not estimated for a teacher with another tokenizer"
        )
    if data.gathers:
        raise ValueError(
            f"the floor of {type(told).__name__} is not known before a run: it tells what the group has written. Estimate it "
            "with a context of columns (AnswerOnly, ReferenceSolution)"
        )
    module.configure_model()
    data.vocabulary = module.vocabulary
    data.setup()
    informed = [replace(p, row=i) for i, p in enumerate(p for p in data.train_prompts if p.informed)]
    chosen = informed[:rows]
    sampler = _shorter(setup.rollout.sampler, tokens)
    written = module.write(chosen, "student", sampler, [fold(0, "floor", p.row) for p in chosen])
    instance = isinstance(told, Context) and told.instance
    contexts = [_tellings(data, informed, i, tellings if instance else 1) for i in range(len(chosen))]
    divergence = module.objective.flat()[0][0].divergence
    direction: Direction = "forward" if isinstance(divergence, ForwardKL) else "reverse"
    start, least = _measured(module, list(zip(chosen, written, contexts, strict=True)), direction)
    return Estimate(
        title=type(told).__name__,
        instance=instance,
        direction=direction,
        start=float(start.mean()),
        floor=float(least.mean()),
        rows=len(chosen),
        tellings=max(map(len, contexts)),
        tokens=len(start),
    )


def _measured(
    module: Any, rows: Sequence[tuple[Prompt, Completion, list[tuple[int, ...]]]], direction: Direction
) -> tuple[Tensor, Tensor]:
    """(N,) divergence from the teacher, and (N,) the floor under it, at every token of every row."""
    starts, floors = [], []
    with torch.no_grad(), evaluating(module.student):
        for prompt, completion, contexts in tqdm(rows, "asking the teacher", leave=False):
            for laws, student in _laws(module, prompt, completion, contexts):
                count = laws.shape[1]
                weights = torch.full((count,), 1.0 / count, dtype=laws.dtype)
                starts.append(mean_divergence(student, laws[:, :1], torch.ones_like(weights[:1]), direction))
                least = floor(laws, weights, direction).clamp(min=0.0)
                floors.append(least if count > 1 else torch.zeros_like(least))  # of one telling it is 0, to the bit
    return torch.cat(starts), torch.cat(floors)


def _shorter(sampler: Any, tokens: int) -> Any:
    """The run's sampler with completions of at most so many tokens."""
    short = copy.copy(sampler)
    short.max_new_tokens = min(sampler.max_new_tokens, tokens)
    return short


def _tellings(data: Any, prompts: Sequence[Prompt], number: int, count: int) -> list[tuple[int, ...]]:
    """The teacher's prompt of a row, and the same with what others are told."""
    own = prompts[number]
    assert own.teacher_ids is not None
    found = [own.teacher_ids]
    tokenizer = data.vocabulary.tokenizer
    for step in range(1, len(prompts)):
        if len(found) == count:
            break
        information = data.teacher_template.information(prompts[(number + step) % len(prompts)].fields)
        text = data.teacher_template.text_with(information, own.fields, tokenizer)
        ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        if ids not in found:
            found.append(ids)
    return found


def _laws(
    module: Any, prompt: Prompt, completion: Completion, contexts: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of (N, I, V) log-probabilities of the teacher under every telling, and (N, V) of the student, on the CPU."""
    vocab, pad = module.vocabulary.size, module.vocabulary.pad_id
    text = Rendering.of(contexts, [completion.ids] * len(contexts), pad)
    theirs = module._ask(module.teacher, text)
    ours = laws_of(module.student, Rendering.of([prompt.ids], [completion.ids], pad), vocab)
    length = len(completion.ids)

    def logprobs(laws: Any, start: int, stop: int) -> Tensor:
        found: Tensor = laws.logits(start, stop).double().log_softmax(-1)
        return found

    piece = max(1, NUMBERS // (len(contexts) * vocab))
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        told = [logprobs(theirs, i * length + start, i * length + stop) for i in range(len(contexts))]
        yield torch.stack(told, 1), logprobs(ours, start, stop)
