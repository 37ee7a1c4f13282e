"""What a race found: every run a record, every method its mean and spread over seeds, a table and a plot."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_lightning.inspect.courses import seconds
from opd_lightning.inspect.page import COLUMNS
from opd_lightning.inspect.report import ROW_TITLES
from opd_lightning.inspect.runs import curves

LABEL = "after"
"""Row of ``summary.json`` with a run's trained student."""
SHOWN = {
    "accuracy": COLUMNS["accuracy"],
    "reverse_kl": COLUMNS["reverse_kl"],
    "neutral_nll": COLUMNS["neutral_nll"],
    "completion_tokens": "completion (tokens)",
    "training_tokens": "training tokens",
    "seconds": "seconds",
}
FORMS = {
    "accuracy": (100, ".1f", " %"),
    "reverse_kl": (1, ".4f", ""),
    "neutral_nll": (1, ".4f", ""),
    "completion_tokens": (1, ".1f", ""),
}
"""Of a metric: factor, format, unit; the others are whole numbers."""
DONE, FAILED, OPEN = "done", "failed", "open"


@dataclass(frozen=True)
class Result:
    """One run of a race.

    Attributes:
        method, seed: which one.
        target: what its objective descends, in words.
        completions: its budget, optimizer steps times completions of a step.
        status: ``done``, ``failed`` or ``open`` (not finished yet).
        error: last error line of a failed run.
        after: what `SHOWN` names, of the trained student; empty unless done.
        before, teacher: the same measurements of the untrained student and of the teacher.
    """

    method: str
    seed: int
    target: str = ""
    completions: int = 0
    status: str = OPEN
    error: str = ""
    after: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, float] = field(default_factory=dict)


def measurements(run: Path) -> dict[str, dict[str, float]]:
    """`Result.after`, ``before`` and ``teacher`` of a finished run, from its folder."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    after, logged = dict(summary[LABEL]), curves(run)
    if written := logged.get("rollout/total_tokens"):
        after["training_tokens"] = written[-1][1]
    if took := seconds(logged):
        after["seconds"] = sum(value for _, value in took)
    return {"after": after, "before": summary["before"], "teacher": summary.get("teacher", {})}


@dataclass(frozen=True)
class Standing:
    """A row of the table.

    Attributes:
        name: the method, or what it is compared with.
        values: metric -> one value per finished seed.
        seeds: how many are finished, and of how many, in words; empty for a row of comparison.
    """

    name: str
    values: dict[str, list[float]]
    seeds: str = ""

    def mean(self, metric: str) -> float | None:
        return statistics.fmean(self.values[metric]) if metric in self.values else None

    def deviation(self, metric: str) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.values[metric]) if len(self.values.get(metric, ())) > 1 else None


def standings(results: list[Result]) -> list[Standing]:
    """Methods, the best accuracy first (the lowest reverse KL where nothing is graded), unfinished ones last."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.method].append(result)
    rows = []
    for name, group in groups.items():
        count = {status: sum(r.status == status for r in group) for status in (DONE, FAILED, OPEN)}
        notes = [f"{count[status]} {status}" for status in (FAILED, OPEN) if count[status]]
        seeds = f"{count[DONE]} of {len(group)} ({', '.join(notes)})" if notes else str(len(group))
        rows.append(Standing(name, _columns([r.after for r in group if r.status == DONE]), seeds))

    def rank(row: Standing) -> tuple[bool, float, float]:
        return not row.values, -(row.mean("accuracy") or 0.0), row.mean("reverse_kl") or 0.0

    return sorted(rows, key=rank)


def references(results: list[Result]) -> list[Standing]:
    """The student before and the teacher, measured once per seed (every method of a seed measures the same)."""
    by_seed = {r.seed: r for r in reversed(results) if r.status == DONE}
    found = {who: _columns([getattr(r, who) for r in by_seed.values()]) for who in ("before", "teacher")}
    return [Standing(ROW_TITLES[who], values) for who, values in found.items() if values]


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: values for key in SHOWN if (values := [row[key] for row in rows if key in row])}


# ---- text ------------------------------------------------------------------------------------------------------------------


def spread(metric: str, mean: float | None, deviation: float | None) -> str:
    """Mean and standard deviation as they are shown.

    >>> spread("accuracy", 0.9321, 0.0042), spread("reverse_kl", 0.01234, None), spread("training_tokens", 147392.0, 81.5)
    ('93.2 ± 0.4 %', '0.0123', '147 392 ± 82')
    """
    if mean is None:
        return ""
    scale, form, unit = FORMS.get(metric, (1, ",.0f", ""))
    if mean == 0.0 and not deviation:
        return "0"  # the teacher's reverse KL, by definition
    shown = [format(scale * value, form).replace(",", " ") for value in (mean, deviation) if value is not None]
    return " ± ".join(shown) + unit


def markdown(results: list[Result]) -> str:
    """The table of a race and what belongs to it, as Markdown that is aligned for a terminal."""
    rows = [*standings(results), *references(results)]
    metrics = [metric for metric in SHOWN if any(metric in row.values for row in rows)]
    cells = [["method", *(SHOWN[m] for m in metrics), "seeds"]]
    cells += [[row.name, *(spread(m, row.mean(m), row.deviation(m)) for m in metrics), row.seeds] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) + " |"
        for line in cells
    ]
    lines.insert(1, "|:" + "-" * widths[0] + "-|-" + ":|-".join("-" * w for w in widths[1:]) + ":|")
    return "\n".join([*lines, "", *_notes(results)]) + "\n"


def _notes(results: list[Result]) -> list[str]:
    budgets = {r.method: f"{r.completions:,}".replace(",", " ") for r in results}
    if len(set(budgets.values())) == 1:
        budget = f"Every run trains on {results[0].completions:,} completions".replace(",", " ")
    else:
        budget = f"**Unequal budgets**, completions a run: {'; '.join(f'{name} {n}' for name, n in budgets.items())}"
    lines = [f"{budget}. ± is the standard deviation over seeds."]
    lines += ["", "What each descends:", ""]
    targets = {r.method: r.target for r in results}
    lines += [f"- {row.name}: {targets[row.name]}" for row in standings(results)]
    if failed := [r for r in results if r.status == FAILED]:
        lines += ["", "Failed:", "", *(f"- {r.method}, seed {r.seed}: {r.error}" for r in failed)]
    return lines


# ---- files -----------------------------------------------------------------------------------------------------------------


def write(folder: Path, results: list[Result], draw: bool) -> None:
    """``race.csv``, ``race.md`` and, if wanted and there is something to draw, ``race.png`` and ``race.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "race.md").write_text(markdown(results), encoding="utf-8")
    with (folder / "race.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "status", *SHOWN, "target", "error"])
        for r in results:
            table.writerow([r.method, r.seed, r.status, *(r.after.get(key, "") for key in SHOWN), r.target, r.error])
    if draw and any(r.status == DONE for r in results):
        _draw(folder, standings(results), references(results))


def _draw(folder: Path, rows: list[Standing], compared: list[Standing]) -> None:
    """One panel a metric: a dot for every seed, mean and standard deviation behind them, the best method on top."""
    from matplotlib import pyplot as plt

    from opd_lightning.inspect.figures import STYLE  # and a backend that needs no display

    rows = [row for row in rows if row.values]
    panels = [m for m in ("accuracy", "reverse_kl") if any(m in row.values for row in rows)]
    if not panels:
        return
    with plt.rc_context({**STYLE, "axes.grid.axis": "x", "font.size": 10}):
        size = (5.2 * len(panels) + 0.8, 1.8 + 0.45 * len(rows))
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for place, metric in zip(axes[0], panels, strict=True):
            _panel(place, metric, rows, compared)
        axes[0][0].set_yticks(range(len(rows)), [row.name for row in rows])
        axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
        legend = "diamond: mean ± standard deviation over seeds; dot: one seed"
        figure.suptitle(legend, x=0.01, ha="left", fontsize=9, color="0.35")
        for name in ("race.png", "race.svg"):
            figure.savefig(folder / name, dpi=160)
        plt.close(figure)


def _panel(axes: Any, metric: str, rows: list[Standing], compared: list[Standing]) -> None:
    scale = 100.0 if metric == "accuracy" else 1.0
    for place, row in enumerate(rows):
        values = [scale * v for v in row.values.get(metric, [])]
        if not values:
            continue
        mean, deviation = statistics.fmean(values), scale * (row.deviation(metric) or 0.0)
        below = deviation if metric == "accuracy" else min(deviation, mean - 0.5 * min(values))  # a log axis has no 0
        bar = [[below], [deviation]] if deviation else None
        axes.errorbar(mean, place, xerr=bar, fmt="D", markersize=6, capsize=4, color=f"C{place % 10}")
        axes.scatter(values, [place + 0.22] * len(values), s=22, color=f"C{place % 10}", alpha=0.55, linewidths=0)
        text = spread(metric, row.mean(metric), row.deviation(metric))
        axes.annotate(
            text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", va="center"
        )
    if metric == "reverse_kl":
        from opd_lightning.inspect.figures import label_log_axis

        axes.set_xscale("log")
        label_log_axis(axes.xaxis, *axes.get_xlim())
    for row in compared:
        level = row.mean(metric)
        if level is not None and (metric == "accuracy" or level > 0.0):  # the teacher's reverse KL is 0
            axes.axvline(scale * level, color="0.45", linestyle="--", linewidth=1.0, zorder=0)
            axes.annotate(
                row.name, (scale * level, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=8, color="0.35",
            )  # fmt: skip
    axes.set_xlabel({"accuracy": "held-out accuracy (%)", "reverse_kl": "held-out reverse KL (nats/token, log scale)"}[metric])
    axes.tick_params(axis="y", length=0)
