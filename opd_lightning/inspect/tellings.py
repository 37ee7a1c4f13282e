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

from opd_lightning.bars import bar
from opd_lightning.data.contexts import Context
from opd_lightning.inspect.floor import LEARNABLE, Direction, floor, mean_divergence
from opd_lightning.inspect.setups import Setup
from opd_lightning.models.distributions import evaluating, laws_of
from opd_lightning.objectives import ForwardKL
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt

__all__ = ["Estimate", "estimate", "floor_at"]

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
    chosen, sampler = informed[:rows], _shorter(setup.rollout.sampler, tokens)
    written = module.write(chosen, "student", sampler, [fold(0, "floor", p.row) for p in chosen])
    divergence = module.objective.flat()[0][0].divergence
    return floor_at(setup, informed, written, tellings, "forward" if isinstance(divergence, ForwardKL) else "reverse")


def floor_at(
    setup: Setup, prompts: Sequence[Prompt], written: Sequence[Completion], tellings: int, direction: Direction
) -> Estimate:
    """The floor under given completions of the student; its network and the teacher's are built, the data is set up.

    Args:
        setup: a run whose teacher is told something that its rows hold.
        prompts: informed ones; what the teacher is told about the later ones is also told in place of the earlier ones'.
        written: completions of the first of them.
        tellings: as `estimate` takes them.
        direction: of the KL.
    """
    module, data = setup.module, setup.data
    told = data.teacher_template
    instance = isinstance(told, Context) and told.instance
    ways = [_tellings(data, prompts, number, tellings if instance else 1) for number in range(len(written))]
    start, least = _measured(module, list(zip(ways, written, strict=True)), direction)
    return Estimate(
        title=type(told).__name__,
        instance=instance,
        direction=direction,
        start=float(start.mean()),
        floor=float(least.mean()),
        rows=len(written),
        tellings=max(map(len, ways)),
        tokens=len(start),
    )


def _measured(module: Any, rows: Sequence[tuple[list[Prompt], Completion]], direction: Direction) -> tuple[Tensor, Tensor]:
    """(N,) divergence from the teacher, and (N,) the floor under it, at every token of every row."""
    starts, floors = [], []
    with torch.no_grad(), evaluating(module.student):
        for told, completion in bar(rows, "asking the teacher"):
            for laws, student in _laws(module, told, completion):
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


def _tellings(data: Any, prompts: Sequence[Prompt], number: int, count: int) -> list[Prompt]:
    """A prompt as it is, and with what the teacher is told about others in its place; no telling comes twice."""
    own = prompts[number]
    assert own.teacher_ids is not None
    found, tokenizer = {own.teacher_ids: own}, data.vocabulary.tokenizer
    for other in (*prompts[number + 1 :], *prompts[:number]):
        if len(found) == count:
            break
        information = data.teacher_template.information(other.fields)
        text = data.teacher_template.text_with(information, own.fields, tokenizer)
        ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        found.setdefault(ids, replace(own, teacher_ids=ids))
    return list(found.values())


def _laws(module: Any, told: list[Prompt], completion: Completion) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of (N, I, V) log-probabilities of the teacher under every telling, and (N, V) of the student, on the CPU."""
    vocab = module.vocabulary.size
    rollout = module.join(told, [completion] * len(told)).to(module.device)
    theirs = module.teacher.laws(module.student, rollout.for_teacher, vocab)
    ours = laws_of(module.student, rollout.text.select(torch.zeros(1, dtype=torch.long)), vocab)
    length = len(completion.ids)

    def logprobs(laws: Any, start: int, stop: int) -> Tensor:
        found: Tensor = laws.logits(start, stop).cpu().double().log_softmax(-1)
        return found

    piece = max(1, NUMBERS // (len(told) * vocab))
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        law = [logprobs(theirs, i * length + start, i * length + stop) for i in range(len(told))]
        yield torch.stack(law, 1), logprobs(ours, start, stop)
