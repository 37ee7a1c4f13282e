"""Prompt sets made of other sets: several together, or one without what stands in another."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning.data.prompts import PromptSet, Row
from opd_lightning.metrics.graders import Grader

__all__ = ["DistinctPrompts", "MixedPrompts"]

WORDS = re.compile(r"\w+")
SHINGLE = 3
"""Words that are compared together."""


class _ByPart(Grader):
    """The grader of the set that a row comes from."""

    def __init__(self, graders: list[Any]) -> None:
        self.graders = graders

    def __call__(self, row: Row, completion: str) -> float:
        return float(self.graders[row["part"]](row, completion))


class MixedPrompts(PromptSet):
    """Several sets as one; the column ``part`` says which a row is of. `Interleaved` (data.selector) fixes their ratio.

    Prompts on which the teacher is at home give most, but lower the student's entropy; "Rethinking On-Policy Distillation"
    (arXiv 2604.13016, section 5.2) advises to mix prompts of elsewhere in, at a ratio that it leaves open.

    Args:
        parts: the sets, those that suit the teacher first.

    Raises:
        ValueError: for fewer than two sets.
    """

    def __init__(self, parts: list[PromptSet]) -> None:
        if len(parts) < 2:
            raise ValueError(f"MixedPrompts(parts={parts}): at least two sets are needed")
        self.parts = parts

    def rows(self) -> list[Row]:
        return [{**row, "part": number} for number, part in enumerate(self.parts) for row in part.rows()]

    def grader(self) -> Grader | None:
        graders = [part.grader() for part in self.parts]
        return _ByPart(graders) if all(graders) else None


class DistinctPrompts(PromptSet):
    """A set without the prompts that stand in other sets: those of the evaluation, those of a cold start.

    Compared are words, without case and punctuation.

    Args:
        prompts: the set that is cut.
        against: sets whose prompts must not occur in it.
        similar: prompts are the same from this share of common runs of three words on (Jaccard index); 1 asks for equal ones.
        itself: also leave out what stands in the set twice.

    Raises:
        ValueError: for a share outside (0, 1], or (in `rows`) if nothing is left.
    """

    def __init__(self, prompts: PromptSet, against: list[PromptSet], similar: float = 1.0, itself: bool = True) -> None:
        if not 0.0 < similar <= 1.0:
            raise ValueError(f"DistinctPrompts(similar={similar}): must lie in (0, 1]")
        self.prompts, self.against, self.similar, self.itself = prompts, against, similar, itself

    def rows(self) -> list[Row]:
        found = self.prompts.rows()
        known = _Known(self.similar)
        for other in self.against:
            for row in other.rows():
                known.add(words(row))
        kept: list[Row] = []
        for row in found:
            if (text := words(row)) in known:
                continue
            kept.append(row)
            if self.itself:
                known.add(text)
        if not kept:
            raise ValueError(f"DistinctPrompts: all {len(found)} prompts stand in the other sets")
        rank_zero_info(f"{len(found) - len(kept)} of {len(found)} prompts stand in other sets or twice: left out")
        return kept

    def grader(self) -> Grader | None:
        return self.prompts.grader()


def words(row: Row) -> tuple[str, ...]:
    """What is asked, in small letters, word by word.

    >>> words({"prompt": "What is 2 + 2?"})
    ('what', 'is', '2', '2')
    """
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt if m["role"] == "user")
    return tuple(WORDS.findall(text.lower())) or (text.strip(),)


class _Known:
    """Texts that have been seen, found again by their runs of words."""

    def __init__(self, similar: float) -> None:
        self.similar = similar
        self.texts: set[tuple[str, ...]] = set()
        self.sizes: list[int] = []
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: tuple[str, ...]) -> None:
        self.texts.add(text)
        if self.similar < 1.0:
            runs = _runs(text)
            for run in runs:
                self.holders[run].append(len(self.sizes))
            self.sizes.append(len(runs))

    def __contains__(self, text: tuple[str, ...]) -> bool:
        if text in self.texts:
            return True
        runs = _runs(text)
        common = Counter(holder for run in runs for holder in self.holders.get(run, ()))
        return any(n / (len(runs) + self.sizes[holder] - n) >= self.similar for holder, n in common.items())


def _runs(text: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + SHINGLE]) for i in range(max(1, len(text) - SHINGLE + 1))}
