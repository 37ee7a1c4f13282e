"""What a configuration trains, read without loading weights, and how two of them differ."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from opd_lightning.callbacks import ColdStart, RolloutRefresh
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.module import OPDModule

AXES = {
    "states": "rollout.source",
    "teacher": "model.teacher",
    "teacher's context": "data.teacher_template",
    "divergence": "model.objective.divergence",
    "support": "model.objective.support",
    "target": "model.objective.target",
    "credit": "model.objective.credit",
    "baseline": "model.objective.baseline",
    "shaper": "model.objective.shaper",
    "gates": "model.objective.gates",
    "route": "model.objective.route",
    "correction": "model.objective.correction",
    "outcome": "model.objective.outcome",
    "reduction": "model.objective.reduction",
    "temperature": "model.objective.temperature",
    "terms": "model.objective.terms",
    "reference": "model.reference",
    "student": "model.student",
    "optimizer": "model.optimizer",
    "learning-rate schedule": "model.scheduler",
    "sampler": "rollout.sampler",
    "steps": "trainer.max_steps",
    "rollouts per step": "data.batch_size",
    "prompts": "data.prompts",
}
"""What a person calls it -> where it stands in a configuration. All other keys that differ follow under their own names."""


@dataclass(frozen=True)
class Setup:
    """A run that has been read but not started.

    Attributes:
        config: everything, defaults included, as plain data.
        module: student recipe, teacher and objective; no weights.
        rollout: who writes, and how often.
        cold_start: the phase before the run's own, if it has steps.
        data: prompts and batches; nothing is tokenized yet.
    """

    config: dict[str, Any]
    module: OPDModule
    rollout: RolloutRefresh
    cold_start: ColdStart
    data: PromptDataModule

    def declared(self) -> list[str]:
        """What is descended, a line for every phase.

        Raises:
            DegenerateObjective: for an objective that does not fit its source.
        """
        self.cold_start.announce(self.module)
        return self.rollout.declare(self.module, self.data)


def _plain(value: Any) -> Any:
    """A configuration with ``{class_path, init_args}`` folded into one dict, the class under ``class``."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "class_path" in value:
        arguments = value.get("init_args") or {}
        return {"class": value["class_path"].rpartition(".")[2], **{k: _plain(v) for k, v in arguments.items()}}
    return {k: _plain(v) for k, v in value.items()}


def _take(config: dict[str, Any], key: str) -> Any:
    """The value under a dotted key, removed; None if there is none."""
    *above, last = key.split(".")
    for part in above:
        config = config.get(part) or {}
    return config.pop(last, None)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{k}={_shown(v)}" for k, v in value.items() if k != "class")
        name = value.get("class")
        return f"{{{inside}}}" if name is None else f"{name}({inside})" if inside else str(name)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "null" if value is None else str(value)


def _differing(name: str, a: Any, b: Any) -> Iterator[tuple[str, str, str]]:
    """Rows of what differs between two values; inside one class only the arguments that do."""
    if a == b:
        return
    if isinstance(a, dict) and isinstance(b, dict) and a.get("class") == b.get("class"):
        for key in dict.fromkeys([*a, *b]):
            yield from _differing(f"{name}.{key}" if name else key, a.get(key), b.get(key))
    else:
        yield name, _shown(a), _shown(b)


def differences(first: Setup, second: Setup) -> list[tuple[str, str, str]]:
    """(name, first's value, second's value) of everything that differs, the axes of the objective before the rest."""
    a, b = _plain(first.config), _plain(second.config)
    rows = []
    for name, key in AXES.items():
        rows += list(_differing(name, _take(a, key), _take(b, key)))
    return rows + list(_differing("", a, b))


def side_by_side(names: tuple[str, str], setups: tuple[Setup, Setup], width: int = 120) -> str:
    """`differences` as a table, and below it what each of the two descends."""
    rows = differences(*setups)
    left = max([len(name) for name, _, _ in rows] + [0]) + 2
    cell = max((width - left) // 2 - 2, 24)
    lines = []
    for name, *values in [("", *names), *rows] if rows else []:
        wrapped = [textwrap.wrap(value, cell) or [""] for value in values]
        for i, (a, b) in enumerate(zip_longest(*wrapped, fillvalue="")):
            lines.append(f"{name if i == 0 else '':<{left}}{a:<{cell + 2}}{b}".rstrip())
    lines += [] if rows else [f"{names[0]} and {names[1]} are the same run"]
    for name, setup in zip(names, setups, strict=True):
        lines += ["", f"{name}:", *(f"  {line}" for line in setup.declared())]
    return "\n".join(lines)
