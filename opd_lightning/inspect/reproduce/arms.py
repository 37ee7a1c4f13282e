"""What a recipe is made of: arms, each run once with every seed, and the records that they leave."""

from __future__ import annotations

import hashlib
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd_lightning.configurable import Configurable

Curve = list[tuple[float, float]]
Tick = Callable[[float], None]
"""Called with the share of an arm that is done, in [0, 1]."""


@dataclass(frozen=True)
class Record:
    """What one arm measured with one seed.

    Attributes:
        figures: name -> number, what criteria are about.
        curves: name -> (step, value) pairs, what is drawn.
        seconds: that it took.
        words: name -> text, for a table of its own.
    """

    figures: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0
    words: dict[str, str] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Record:
        return cls(**json.loads(file.read_text(encoding="utf-8")))


class Networks:
    """Folders of the networks that arms begin with or learn from, one a seed.

    Args:
        folder: below which they lie.
        arms: name -> the arm that trains it.
    """

    def __init__(self, folder: Path, arms: dict[str, Arm]) -> None:
        self.folder, self.arms = folder, arms

    def path(self, name: str, seed: int) -> Path:
        """Where a network lies or will lie."""
        return self.folder / f"{name}-{seed}-{self.key(self.arm(name))}"

    def arm(self, name: str) -> Arm:
        """The arm that trains a network.

        Raises:
            ValueError: for a name that is not there.
        """
        if name not in self.arms:
            raise ValueError(f"no network {name!r}; reproduce/networks.yaml has {', '.join(self.arms)}")
        return self.arms[name]

    def key(self, arm: Arm) -> str:
        """A short name for all that decides what an arm measures: its arguments and those of the networks below it."""
        below = {name: self.key(self.arm(name)) for name in arm.needs}
        text = json.dumps([arm.to_config(), below], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Arm(Configurable, ABC):
    """One measurement that is repeated with every seed.

    Attributes:
        needs: names of the networks that must be trained before it.
        work: rough seconds on one core, for the bar.
    """

    needs: tuple[str, ...] = ()
    work: float = 1.0

    @abstractmethod
    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        """Measure.

        Args:
            seed: of everything that is drawn.
            networks: trained ones.
            tick: told how far it is.
            keep: folder for the trained network; None does not keep it.
        """

    @classmethod
    def table(cls, found: Sequence[tuple[Any, Sequence[Record]]]) -> list[str]:
        """Markdown lines of a table over all arms of a recipe with their records; empty for what needs none of its own."""
        return []


def first_and_last(curves: dict[str, Curve]) -> dict[str, float]:
    """``NAME_start``, ``NAME_end`` and ``NAME_mean`` of every curve: means over its first two, its last tenth and all values.

    >>> first_and_last({"overlap": [(0, 0.5), (1, 0.75), (2, 1.0)]})
    {'overlap_start': 0.625, 'overlap_end': 1.0, 'overlap_mean': 0.75}
    """
    found: dict[str, Any] = {}
    for name, curve in curves.items():
        values = [value for _, value in curve]
        last = max(len(values) // 10, 1)
        found[f"{name}_start"] = statistics.fmean(values[:2])
        found[f"{name}_end"] = statistics.fmean(values[-last:])
        found[f"{name}_mean"] = statistics.fmean(values)
    return found
