"""In which order prompts are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from opd_lightning.configurable import Configurable
from opd_lightning.seeds import fold
from opd_lightning.types import Prompt

__all__ = ["ByDifficulty", "ByLength", "Interleaved", "Selector", "Shuffled", "TeacherAligned"]

Score = Literal["grade", "likelihood", "mass", "headroom"]


class Selector(Configurable, ABC):
    """Which prompts of the set are used in a pass over it, and in which order.

    The order is a function of (seed, pass), so that a resumed run continues where it stopped.

    Attributes:
        probe_samples: completions per prompt that the student writes before training so that `order` knows how hard a prompt
            is; 0 if it does not matter.
        score: what the probe tells of a prompt, a mean over its completions. ``grade``: the share of right answers.
            ``likelihood``: the teacher's log-probability of the student's text, nats per token. ``mass``: the student's
            probability on tokens that both models prefer. ``headroom``: the reverse KL, nats per token, that is left to learn.
    """

    probe_samples: int = 0
    score: Score = "grade"

    @abstractmethod
    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        """Positions in ``prompts``, at least one.

        Args:
            prompts: the training prompts.
            scores: of every prompt, if probed; see `score`.
            epoch: number of the pass over the set, from 0.
            seed: of the run.
        """


def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(fold(seed, "prompts", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


class Shuffled(Selector):
    """Every prompt once a pass, in a new order each time."""

    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        return _shuffled(len(prompts), epoch, seed)


class ByLength(Selector):
    """A curriculum over the prompt's length in tokens; equal lengths are shuffled.

    Args:
        descending: longest first.
    """

    def __init__(self, descending: bool = False) -> None:
        self.descending = descending

    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        shuffled = _shuffled(len(prompts), epoch, seed)
        return sorted(shuffled, key=lambda i: len(prompts[i].ids), reverse=self.descending)


class ByDifficulty(Selector):
    """Prompts that the student, asked before training, answers neither too rarely nor too often; easiest first.

    Args:
        low: smallest share of right answers that is kept.
        high: largest share that is kept.
        samples: completions per prompt in the probe.
        easiest_first: false shuffles what is kept.

    Raises:
        ValueError: if the bounds are not 0 <= low <= high <= 1, or (in `order`) nothing lies between them.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, samples: int = 4, easiest_first: bool = True) -> None:
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"ByDifficulty(low={low}, high={high}): needs 0 <= low <= high <= 1")
        if samples < 1:
            raise ValueError(f"ByDifficulty(samples={samples}): at least one completion per prompt is needed")
        self.low, self.high, self.easiest_first = low, high, easiest_first
        self.probe_samples = samples

    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        if scores is None:
            raise RuntimeError("ByDifficulty needs the probe that RolloutRefresh runs at the start of training")
        kept = [i for i in _shuffled(len(prompts), epoch, seed) if self.low <= scores[i] <= self.high]
        if not kept:
            raise ValueError(
                f"no prompt has a share of right answers in [{self.low}, {self.high}]; the probe found "
                f"{min(scores):.2f} to {max(scores):.2f}. Widen data.selector.low / high."
            )
        return sorted(kept, key=lambda i: -scores[i]) if self.easiest_first else kept


class TeacherAligned(Selector):
    """The prompts on which teacher and student are nearest, or furthest apart, after a probe of both before training.

    Prompts that suit the teacher gave more overlap mass and a better student in "Rethinking On-Policy Distillation" (arXiv
    2604.13016, section 5.2); there they were those that the teacher had been trained on, here they are measured. Such prompts
    alone lower the student's entropy: mix others in (`MixedPrompts`, `Interleaved`).

    Args:
        by: ``likelihood`` and ``mass`` keep the prompts with the highest score, on which the teacher knows the student's text;
            ``headroom`` those with the most left to learn.
        keep: share of the prompts that is used.
        samples: completions per prompt in the probe.
        best_first: a curriculum from the best score down; false shuffles what is kept.

    Raises:
        ValueError: for a share outside (0, 1], no samples, or an unknown score.
    """

    def __init__(
        self,
        by: Literal["likelihood", "mass", "headroom"] = "mass",
        keep: float = 0.5,
        samples: int = 1,
        best_first: bool = False,
    ) -> None:
        if not 0.0 < keep <= 1.0 or samples < 1 or by not in ("likelihood", "mass", "headroom"):
            raise ValueError(
                f"TeacherAligned(by={by!r}, keep={keep}, samples={samples}): likelihood, mass or headroom; a share in (0, 1]; "
                "at least one completion per prompt"
            )
        self.score, self.keep, self.probe_samples, self.best_first = by, keep, samples, best_first

    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        if scores is None:
            raise RuntimeError("TeacherAligned needs the probe that RolloutRefresh runs at the start of training")
        best = sorted(range(len(prompts)), key=lambda i: (-scores[i], i))[: max(1, round(self.keep * len(prompts)))]
        if self.best_first:
            return best
        chosen = set(best)
        return [i for i in _shuffled(len(prompts), epoch, seed) if i in chosen]


class Interleaved(Selector):
    """Prompts of several sets at a fixed ratio, at every stretch of the run and not only on average.

    A pass ends when the first set is used up; the others begin anew as often as it takes.

    Args:
        shares: of the parts of `MixedPrompts`, in their order, with sum 1.
        first: order within the first part; null shuffles it. The others are shuffled.

    Raises:
        ValueError: if the shares are not positive numbers with sum 1, or (in `order`) do not match the parts.

    >>> def of(part): return Prompt(0, "", (1,), fields={"part": part})
    >>> parts = [of(0), of(0), of(0), of(1)]
    >>> [parts[i].fields["part"] for i in Interleaved([0.75, 0.25]).order(parts, None, 0, 0)]
    [0, 0, 1, 0]
    """

    def __init__(self, shares: list[float], first: Selector | None = None) -> None:
        if len(shares) < 2 or min(shares) <= 0.0 or abs(sum(shares) - 1.0) > 1e-6:
            raise ValueError(f"Interleaved(shares={shares}): one positive share a part, with sum 1")
        self.shares, self.first = shares, first or Shuffled()
        self.probe_samples, self.score = self.first.probe_samples, self.first.score

    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        parts: list[list[int]] = [[] for _ in self.shares]
        for i, prompt in enumerate(prompts):
            part = prompt.fields.get("part", -1)
            if not 0 <= part < len(parts):
                raise ValueError(
                    f"Interleaved(shares={self.shares}) mixes {len(parts)} parts, but a prompt is of part {part}: give "
                    "data.prompts: MixedPrompts as many parts"
                )
            parts[part].append(i)
        if empty := [n for n, part in enumerate(parts) if not part]:
            raise ValueError(f"Interleaved(shares={self.shares}): part {empty[0]} of data.prompts has no prompts")
        own = parts[0]
        of_first = [scores[i] for i in own] if scores is not None else None
        left = [[own[i] for i in self.first.order([prompts[i] for i in own], of_first, epoch, seed)], *([] for _ in parts[1:])]
        out: list[int] = []
        taken, rounds = [0] * len(parts), [0] * len(parts)
        while True:
            part = max(range(len(parts)), key=lambda n: (self.shares[n] * (len(out) + 1) - taken[n], -n))
            if part == 0 and not left[0]:
                return out
            if not left[part]:
                again = _shuffled(len(parts[part]), epoch, fold(seed, "part", part, rounds[part]))
                left[part], rounds[part] = [parts[part][i] for i in again], rounds[part] + 1
            out.append(left[part].pop(0))
            taken[part] += 1
