"""In which order prompts are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from opd_lightning.configurable import Configurable
from opd_lightning.seeds import fold
from opd_lightning.types import Prompt

__all__ = ["ByDifficulty", "ByLength", "Selector", "Shuffled"]


class Selector(Configurable, ABC):
    """Which prompts of the set are used in a pass over it, and in which order.

    The order is a function of (seed, pass), so that a resumed run continues where it stopped.

    Attributes:
        probe_samples: completions per prompt that the student writes before training so that `order` knows how hard a prompt
            is; 0 if it does not matter.
    """

    probe_samples: int = 0

    @abstractmethod
    def order(self, prompts: Sequence[Prompt], scores: Sequence[float] | None, epoch: int, seed: int) -> list[int]:
        """Positions in ``prompts``, at least one.

        Args:
            prompts: the training prompts.
            scores: the student's share of right answers per prompt, if probed.
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
