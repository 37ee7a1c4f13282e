"""How the methods of a race got where they are: held-out measurements against tokens trained on and seconds of training."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_lightning.inspect.runs import Curves, curves, history

MEASURED = {
    "reverse_kl": "held-out reverse KL (nats/token)",
    "accuracy": "held-out accuracy",
    "neutral_nll": "neutral text (nats/token)",
}
AGAINST = {"training_tokens": "completion tokens trained on", "seconds": "seconds of training, evaluation left out"}

Course = list[dict[str, float]]
"""Measurements of a run's student, oldest first: ``step``, what `AGAINST` names, and those of `MEASURED` that there are."""


def seconds(logged: Curves) -> list[tuple[int, float]]:
    """Seconds of every optimizer step, what was spent on evaluation left out.

    >>> seconds({"train/step_seconds": [(0, 2.0), (1, 5.0)], "time/evaluation": [(1, 3.5)]})
    [(0, 2.0), (1, 1.5)]
    """
    evaluation = dict(logged.get("time/evaluation", []))
    return [(step, took - evaluation.get(step, 0.0)) for step, took in logged.get("train/step_seconds", [])]


def course(run: Path) -> Course:
    """What was measured on the way of a run."""
    logged = curves(run)
    took, tokens = seconds(logged), logged.get("rollout/total_tokens", [])
    return [
        {
            "step": row["step"],
            "training_tokens": max((n for step, n in tokens if step < row["step"]), default=0.0),
            "seconds": sum(s for step, s in took if step < row["step"]),
            **{key: row[key] for key in MEASURED if key in row},
        }
        for row in history(run)
        if row["who"] == "student"
    ]


def write(folder: Path, runs: Sequence[tuple[str, int, Path]], draw: bool) -> None:
    """``race_courses.csv`` and, if wanted, ``race_courses.png``; nothing where all were measured before and after alone.

    Args:
        folder: of the race.
        runs: method, seed and folder of each.
        draw: whether the picture is wanted.
    """
    found = {(method, seed): course(run) for method, seed, run in runs}
    if all(len(rows) <= 2 for rows in found.values()):
        return
    with (folder / "race_courses.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "step", *AGAINST, *MEASURED])
        for (method, seed), rows in found.items():
            table.writerows([method, seed, r["step"], *(r.get(key, "") for key in (*AGAINST, *MEASURED))] for r in rows)
    if draw:
        _draw(folder / "race_courses.png", found)


def _draw(file: Path, found: dict[tuple[str, int], Course]) -> None:
    """A row of panels for every measurement, a column for tokens and one for seconds."""
    from matplotlib import pyplot as plt

    from opd_lightning.inspect.figures import STYLE, label_log_axis

    measured = [key for key in MEASURED if any(key in row for rows in found.values() for row in rows)]
    methods = list(dict.fromkeys(method for method, _ in found))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(measured), 2, figsize=(9, 1 + 2.4 * len(measured)), sharey="row", squeeze=False, layout="constrained"
        )
        for line, key in zip(axes, measured, strict=True):
            for panel, against in zip(line, AGAINST, strict=True):
                for number, method in enumerate(methods):
                    _lines(panel, [rows for (name, _), rows in found.items() if name == method], against, key, method, number)
                panel.set_xlabel(AGAINST[against])
                if key == "reverse_kl":
                    panel.set_yscale("log")
                    label_log_axis(panel.yaxis, *panel.get_ylim())
            line[0].set_ylabel(MEASURED[key])
        axes[0][0].legend(frameon=False)
        figure.suptitle("thick: mean over seeds; thin: one seed", x=0.01, ha="left", fontsize=9, color="0.35")
        figure.savefig(file, dpi=160)
        plt.close(figure)


def _lines(panel: Any, seeds: Sequence[Course], against: str, key: str, method: str, number: int) -> None:
    together: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for rows in seeds:
        shown = [row for row in rows if key in row]
        panel.plot([r[against] for r in shown], [r[key] for r in shown], color=f"C{number}", linewidth=0.8, alpha=0.4)
        for row in shown:
            together[row["step"]].append((row[against], row[key]))
    # A seed that is still on its way would bend the mean.
    complete = [values for _, values in sorted(together.items()) if len(values) == max(map(len, together.values()))]
    x, y = ([statistics.fmean(value[i] for value in values) for values in complete] for i in (0, 1))
    panel.plot(x, y, color=f"C{number}", linewidth=2.0, marker="o", markersize=3.5, label=method)
