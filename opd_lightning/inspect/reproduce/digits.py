"""The toy world of the recipes: sums of digits modulo 7, written in one of several ways, and teachers that know the way.

A prompt is a row of digits and a mark, ``314052=``. A completion opens with the letter of its pattern and closes with ``#`` and
the answer::

    A   every digit, then the sum so far            easy: one small step a token
    B   the sum so far after every second digit     short and hard: three numbers are added in one token
    C   like A, from the last digit to the first    as easy as A, but another way of thinking

What a model knows (how to add) and how it likes to write (which letter) can be set apart here, which is what "Rethinking
On-Policy Distillation" (arXiv 2604.13016) is about. Exact next-token laws of a writer are known in closed form.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_lightning.data.tasks import Task
from opd_lightning.models.teachers.mixed import FunctionTeacher
from opd_lightning.models.tiny import SPECIAL, character_tokenizer

MODULUS = 7
PATTERNS = "ABC"
CHARACTERS = "0123456=:#ABC"
EOS = SPECIAL.index("<eos>")
FIRST = len(SPECIAL)
HASH, LETTER, COLON = (FIRST + CHARACTERS.index(c) for c in "#A:")
MARKS = "=:"


class DigitSum(Task):
    """Sums of digits modulo 7.

    Args:
        digits: in a prompt, an even number.
        patterns: how often a completion is written in each pattern; shares with sum 1. ``{"A": 0.5, "C:": 0.5}`` ties a pattern
            to a mark.
        mark: closes the prompt, ``=`` or ``:``; two templates of the same question.
        numbers: which digits occur, or such sets with shares; all digits of a prompt are of one set.
        slip: chance that a sum is written wrong; what follows goes on from it.

    Raises:
        ValueError: for an odd number of digits, shares that do not sum to 1, or an unknown pattern, mark or digit.

    >>> DigitSum(4, {"A": 1.0}).row(random.Random(1))["completion"]
    'A66656404#4'
    """

    CHARACTERS = CHARACTERS

    def __init__(
        self,
        digits: int = 6,
        patterns: dict[str, float] | None = None,
        mark: str = "=",
        numbers: str | dict[str, float] = "0123456",
        slip: float = 0.0,
    ) -> None:
        self.slip = slip
        self.digits, self.patterns, self.mark = digits, patterns or {"A": 1.0}, mark
        self.numbers = {numbers: 1.0} if isinstance(numbers, str) else numbers
        ways = [way if len(way) == 2 else way + mark for way in self.patterns]
        unknown = set("".join(ways)) - set(PATTERNS + MARKS) or set("".join(self.numbers)) - set(CHARACTERS[:MODULUS])
        uneven = [shares for shares in (self.patterns, self.numbers) if abs(sum(shares.values()) - 1.0) > 1e-6]
        if digits < 2 or digits % 2 or unknown or uneven:
            raise ValueError(
                f"DigitSum(digits={digits}, patterns={self.patterns}, mark={mark!r}, numbers={numbers!r}): an even number of "
                f"digits, patterns of {', '.join(PATTERNS)}, a mark of {MARKS!r}, digits below {MODULUS}, shares with sum 1"
            )
        self.ways = ways

    def row(self, random_numbers: random.Random) -> dict[str, Any]:
        (numbers,) = random_numbers.choices(list(self.numbers), list(self.numbers.values()))
        digits = [int(random_numbers.choice(numbers)) for _ in range(self.digits)]
        (way,) = random_numbers.choices(self.ways, list(self.patterns.values()))
        return {
            "prompt": "".join(map(str, digits)) + way[1],
            "completion": written(digits, way[0], lambda: random_numbers.random() < self.slip),
            "answer": sum(digits) % MODULUS,
        }

    def __call__(self, row: Any, completion: str) -> float:
        return float(completion.rpartition("#")[2] == str(row["answer"]))


def written(digits: list[int], pattern: str, slips: Callable[[], bool] = lambda: False) -> str:
    """The completion of a prompt in a pattern; where ``slips()`` is true, a sum is one too large.

    >>> [written([3, 1, 4, 5], p) for p in "ABC"]
    ['A33144156#6', 'B46#6', 'C55421336#6']
    """
    order = digits[::-1] if pattern == "C" else digits
    parts, total = [], 0
    for i, digit in enumerate(order, 1):
        total = (total + digit + slips()) % MODULUS
        parts.append(f"{digit}{total}" if pattern != "B" else str(total) if i % 2 == 0 else "")
    return f"{pattern}{''.join(parts)}#{total}"


def correct(ids: Tensor, digits: int) -> Tensor:
    """(B,) whether rows of tokens hold ``#`` and then the right answer; the prompt's digits stand behind the first token."""
    answer = (ids[:, 1 : digits + 1] - FIRST).sum(-1) % MODULUS
    marks = ids == HASH
    place = marks.int().argmax(-1).clamp(max=ids.shape[1] - 3)
    rows = torch.arange(len(ids))
    closed = (ids[rows, place + 1] == answer + FIRST) & (ids[rows, place + 2] == EOS)
    return closed & marks.any(-1)


def targets(ids: Tensor, digits: int) -> Tensor:
    """(B, 3, L - 1) the token that a writer without errors puts behind every position, in each pattern.

    It goes on from what stands there: the next sum is the last *written* one plus the prompt's digits.
    """
    batch, length = ids.shape
    prompt = ids[:, 1 : digits + 1] - FIRST
    start = digits + 2  # the first completion token: its pattern
    out = torch.full((batch, len(PATTERNS), length - 1), EOS)
    known = (ids - FIRST).clamp(min=0) % MODULUS
    for number, pattern in enumerate(PATTERNS):
        order = prompt.flip(1) if pattern == "C" else prompt
        stride, width = (2, 1) if pattern == "B" else (1, 2)  # digits of a step, tokens of a step
        for place in range(1, length - start):  # place of the token in the completion
            step, inside = divmod(place - 1, width)
            before = known[:, start + place - width] if step else torch.zeros(batch, dtype=torch.long)
            position = start + place - 1
            if step * stride < digits:
                copied = width == 2 and inside == 0
                added = order[:, step * stride : (step + 1) * stride].sum(-1)
                out[:, number, position] = FIRST + (order[:, step] if copied else (before + added) % MODULUS)
            elif place == width * digits // stride + 1:
                out[:, number, position] = HASH
            elif place == width * digits // stride + 2:
                out[:, number, position] = known[:, position - 1]  # the last sum, in front of the #
                out[:, number, position] += FIRST
    return out


class GrammarTeacher(FunctionTeacher):
    """A writer that is known in closed form: how often it takes each pattern, and how often it slips.

    A slip is another token than the meant one; likelier ones are near behind it in the vocabulary.

    Args:
        patterns: shares with sum 1.
        slip: probability of a slip, at every token.
        digits: of a prompt.
        under_colon: shares where the prompt ends in ``:``; null takes the same.
        reliable: tokens of a completion behind which slips get likelier, up to 0.9 six tokens later; 0 for never.
    """

    def __init__(
        self,
        patterns: dict[str, float],
        slip: float = 0.02,
        digits: int = 6,
        under_colon: dict[str, float] | None = None,
        reliable: int = 0,
    ) -> None:
        self.shares = torch.tensor([[of.get(p, 0.0) for p in PATTERNS] for of in (patterns, under_colon or patterns)])
        self.slip, self.digits, self.reliable = slip, digits, reliable
        super().__init__(self.logprobs)

    def logprobs(self, ids: Tensor, vocab: int) -> Tensor:
        """(B, L - 1, V) its law behind every position of right-padded prompts with completions."""
        device, ids = ids.device, ids.cpu()
        distance = (torch.arange(vocab)[None] - torch.arange(vocab)[:, None]) % vocab
        tail = torch.exp(-0.5 * distance.float()).fill_diagonal_(0.0)
        start, width = self.digits + 2, ids.shape[1] - 1
        shares = self.shares[(ids[:, start - 1] == COLON).long()]
        pattern = ids[:, min(start, width)] - LETTER
        pattern = torch.where((pattern >= 0) & (pattern < len(PATTERNS)), pattern, shares.argmax(-1))
        meant = torch.nn.functional.one_hot(targets(ids, self.digits)[torch.arange(len(ids)), pattern], vocab).float()
        meant[:, start - 1] = 0.0
        meant[:, start - 1, LETTER : LETTER + len(PATTERNS)] = shares
        depth = torch.arange(width) - (start - 1)
        slip = torch.full((width, 1), self.slip)
        if self.reliable:
            slip += (0.9 - self.slip) * ((depth - self.reliable) / 6).clamp(0.0, 1.0)[:, None]
        law = (1.0 - slip) * meant + slip * (meant @ (tail / tail.sum(-1, keepdim=True)))
        return law.log().to(device)


def vocabulary_size() -> int:
    """Tokens of the world's vocabulary."""
    return FIRST + len(CHARACTERS)


def prompts(task: DigitSum, count: int, seed: int) -> Tensor:
    """(count, digits + 2) tokens of held-out prompts."""
    tokenizer = character_tokenizer(CHARACTERS)
    return torch.tensor([tokenizer(row["prompt"]).input_ids for row in task.rows(count, seed, "held_out")])


Laws = Callable[[Tensor, int], Tensor]


def continued(law: Laws, ids: Tensor, longest: int, generator: torch.Generator, start: int = 0) -> Tensor:
    """Rows continued by a law by ``longest`` tokens; a row that holds an EOS from ``start`` on gets nothing but EOS."""
    ended = (ids[:, start:] == EOS).any(-1)
    for _ in range(longest):
        wider = torch.cat([ids, torch.full((len(ids), 1), EOS)], 1)
        drawn = torch.multinomial(law(wider, vocabulary_size())[:, -1].exp(), 1, generator=generator)[:, 0]
        drawn = drawn.where(~ended, torch.tensor(EOS))
        ids = torch.cat([ids, drawn[:, None]], 1)
        ended |= drawn == EOS
    return ids
