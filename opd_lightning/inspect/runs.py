"""Finished and unfinished runs as they lie on the disk, made ready for the report."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.callbacks import run_card
from opd_lightning.callbacks.position_map import QUANTITIES
from opd_lightning.callbacks.series import read

Curves = dict[str, list[tuple[int, float]]]
POINTS = 400
"""Of a curve in the report; longer ones are averaged in stretches."""
RECORDS = 3_000_000
"""Bytes of token records in a report, all runs together."""
ONLY_NAMES = ("report", "ckpt_path")
"""Keys of a configuration that change nothing that is trained."""


def history(run: Path) -> list[dict[str, Any]]:
    """Its measurements on held-out prompts, oldest first."""
    file = run / "eval" / "history.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """A measurement without its label."""
    return {k: v for k, v in row.items() if k not in ("who",)}


def curves(run: Path) -> Curves:
    """Everything that was logged, key -> (step, value), joined over resumptions: a later log replaces what it repeats."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    versions = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1]))
    for file in versions:
        with file.open(encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                for key, value in row.items():
                    if value and key not in ("step", "epoch") and not key.startswith("eval/"):
                        found[key][int(row["step"])] = float(value)
    for row in history(run):
        if row["who"] == "student":
            for key, value in metrics(row).items():
                if key != "step":
                    found[f"eval/{key}"][row["step"]] = value
    return {key: sorted(points.items()) for key, points in found.items()}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: shown.
        folder: where it lies.
    """

    name: str
    folder: Path

    @property
    def card(self) -> run_card.Card | None:
        return run_card.load(self.folder)

    @property
    def config(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What rang, oldest first."""
        card = self.card
        fired: Any = card["items"]["stability"]["alarms"] if card else "none"
        return [] if fired == "none" else fired

    def measured(self, who: str) -> list[dict[str, float]]:
        """What `CompletionEval` found for ``student`` or ``teacher``, oldest first."""
        return [metrics(row) for row in history(self.folder) if row["who"] == who]

    def recipe(self) -> Any:
        """The configuration without seeds and names: equal for runs that repeat each other. Its folder where there is none."""
        if not self.config:
            return str(self.folder)
        return _without_seeds(yaml.safe_load(self.config))

    def to_data(self, records: int) -> dict[str, Any]:
        """What the page's script draws.

        Args:
            records: bytes that its token records may take.
        """
        return {
            "name": self.name,
            "curves": {key: _thinned(points, not key.startswith("eval/")) for key, points in curves(self.folder).items()},
            "alarms": [{key: alarm[key] for key in ("step", "alarm", "what")} for alarm in self.alarms],
            "positions": _positions(self.folder),
            **_tokens(self.folder, records),
        }


def _without_seeds(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    dropped = {"seed", "seed_everything", "default_root_dir", *ONLY_NAMES}
    return {key: _without_seeds(value) for key, value in config.items() if key not in dropped}


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[int]]]:
    """Runs that differ in their seeds alone belong together: name -> numbers of the runs."""
    found: list[tuple[Any, list[int]]] = []
    for i, run in enumerate(runs):
        recipe = run.recipe()
        for known, members in found:
            if known == recipe:
                members.append(i)
                break
        else:
            found.append((recipe, [i]))
    named = []
    for _, members in found:
        first = runs[members[0]].name
        # gkd/seed-0 and gkd/seed-1 are gkd
        shared = {re.sub(r"[-_/. ]*(seed|run)?[-_= ]*\d+$", "", runs[i].name) for i in members}
        named.append((shared.pop() or first if len(members) > 1 and len(shared) == 1 else first, members))
    return named


def named(folders: Sequence[Path]) -> list[Run]:
    """Runs with the shortest names that tell them apart.

    >>> [run.name for run in named([Path("runs/a/seed-0"), Path("runs/b/seed-0")])]
    ['a/seed-0', 'b/seed-0']
    """
    full = [folder.resolve() for folder in folders]
    if len(full) == 1:
        return [Run(full[0].name, folders[0])]
    above = Path(os.path.commonpath(full))
    return [Run(str(path.relative_to(above)) if path != above else path.name, f) for path, f in zip(full, folders, strict=True)]


def _thinned(points: list[tuple[int, float]], late: bool) -> dict[str, list[Any]]:
    """A curve by the number of finished optimizer steps, which Lightning's own counter (``late``) is one behind."""
    stretch = -(-len(points) // POINTS)
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return {
        "steps": [part[-1][0] + late for part in parts],
        "values": [_number(sum(value for _, value in part) / len(part)) for part in parts],
    }


def _number(value: float) -> float | None:
    """Five digits; None for what JSON cannot say."""
    return float(f"{value:.5g}") if value - value == 0.0 else None


def _positions(folder: Path, lines: int = 200) -> dict[str, Any] | None:
    found = read(folder / "positions.jsonl")
    found = [line for line in found if line["width"] == found[-1]["width"] and len(line["count"]) == len(found[-1]["count"])]
    if not found:
        return None
    found = found[:: -(-len(found) // lines)]
    empty = [None] * len(found[0]["count"])
    maps = {name: [line.get(name, empty) for line in found] for name in QUANTITIES if any(name in line for line in found)}
    return {"width": found[0]["width"], "steps": [line["step"] for line in found], **maps}


def _tokens(folder: Path, size: int) -> dict[str, Any]:
    found = read(folder / "tokens.jsonl")
    steps = sorted({line["step"] for line in found})
    written = sum(len(json.dumps(line)) for line in found)
    if written > size and len(steps) > 1:  # fewer steps, at even distances
        keep = max(2, int(len(steps) * size / written))
        chosen = {steps[i * (len(steps) - 1) // (keep - 1)] for i in range(keep)}
        found = [line for line in found if line["step"] in chosen]
    pieces: dict[str, str] = {}
    for line in found:
        pieces |= line.pop("pieces")
        line.pop("completion")
    return {"pieces": pieces, "tokens": found}
