"""What ``opd reproduce`` shows: a page and a figure a recipe, a table of all, plain data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_lightning.inspect.reproduce.arms import Record
from opd_lightning.inspect.reproduce.criteria import number
from opd_lightning.inspect.reproduce.run import PASS, Verdict

BEGIN, END = "<!-- reproduce: begin -->", "<!-- reproduce: end -->"
SHOWN = 12
"""Figures of an arm on its page that no criterion asks for."""


def short(verdict: Verdict) -> str:
    """``R1``."""
    return verdict.recipe.name.partition("_")[0].upper()


def summary(verdicts: Sequence[Verdict]) -> str:
    """A row a recipe: the claim, the verdict, and how many criteria hold, the first and all that do not with their figures."""
    lines = ["| | claim | verdict | criteria, with mean ± standard deviation over seeds |", "|---|---|---|---|"]
    for verdict in verdicts:
        found = verdict.judgements
        shown = [j for i, j in enumerate(found) if i == 0 or not j.holds]
        cells = [f"{sum(j.holds for j in found)} of {len(found)} hold"] if found else []
        cells += [f"{'' if j.holds else '**not** '}`{j.text}`: {j.measured()}" for j in shown]
        cell = "<br>".join(cells) or verdict.error.partition("\n")[0] or "-"
        lines.append(f"| {short(verdict)} | {verdict.recipe.title} | {verdict.status} | {cell} |")
    finished = [v for v in verdicts if v.judgements]
    passed = sum(v.status == PASS for v in finished)
    seeds = sorted({len(v.seeds) for v in finished})
    lines += ["", f"{passed} of {len(finished)} claims pass, {len(finished) - passed} are nulls"]
    lines[-1] += f"; {' to '.join(map(str, seeds))} seeds each." if seeds else "."
    return "\n".join(lines)


def terminal(verdicts: Sequence[Verdict]) -> str:
    """The same for a terminal, a line a criterion."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{short(verdict):4} {verdict.status.upper():7} {verdict.recipe.title}")
        lines += [f"       {'yes' if j.holds else 'NO ':4} {j.text}   measured {j.measured()}" for j in verdict.judgements]
        lines += [f"       {verdict.error}"] if verdict.error else []
    return "\n".join(lines)


def as_json(verdicts: Sequence[Verdict]) -> str:
    """Verdicts, criteria and all figures of all seeds."""
    found: dict[str, Any] = {}
    for v in verdicts:
        found[v.recipe.name] = {
            "claim": v.recipe.title,
            "source": v.recipe.source,
            "verdict": v.status,
            "error": v.error,
            "seeds": list(v.seeds),
            "seconds": round(v.seconds, 1),
            "criteria": [asdict(j) for j in v.judgements],
            "figures": {arm: [r.figures for r in records] for arm, records in v.records.items()},
        }
    return json.dumps(found, indent=1)


def page(verdict: Verdict, figure: bool) -> str:
    """One recipe as Markdown."""
    recipe = verdict.recipe
    lines = [f"# {recipe.title}", "", f"Source: {recipe.source}", "", f"**{verdict.status.upper()}**"]
    lines[-1] += f" over {len(verdict.seeds)} seeds, {verdict.seconds:.0f} s of one core (networks not counted)."
    if verdict.judgements:
        lines += ["", "| criterion | holds | measured | wanted |", "|---|---|---|---|"]
        lines += [
            f"| `{j.text}` | {'yes' if j.holds else '**no**'} | {j.measured()} | {j.wanted} |" for j in verdict.judgements
        ]
    if figure:
        lines += ["", f"![{recipe.name}]({recipe.name}.svg)"]
    if own := own_table(verdict):
        lines += ["", *own]
    if recipe.note:
        lines += ["", recipe.note]
    lines += ["", "Every arm, mean ± standard deviation over seeds:", "", *_arms(verdict)]
    lines += ["", "```yaml", recipe.file.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def own_table(verdict: Verdict) -> list[str]:
    """What a recipe shows beside its criteria; empty for most, and before all its arms are there."""
    arms = verdict.recipe.arms
    kinds = {type(arm) for arm in arms.values()}
    if len(kinds) != 1 or not verdict.judgements:
        return []
    return kinds.pop().table([(arm, verdict.records[name]) for name, arm in arms.items()])


def _arms(verdict: Verdict) -> list[str]:
    asked = " ".join(c.text for c in verdict.recipe.criteria)
    lines = ["| arm | figures |", "|---|---|"]
    for arm, records in verdict.records.items():
        if not records:
            continue
        names = sorted(records[0].figures, key=lambda name: (f".{name}" not in asked, name))
        count = SHOWN + sum(f".{name}" in asked for name in names)
        lines.append(f"| {arm} | {', '.join(f'{name} {spread(records, name)}' for name in names[:count])} |")
    return lines


def spread(records: Sequence[Record], name: str) -> str:
    """Mean and standard deviation of a figure."""
    values = [r.figures[name] for r in records]
    deviation = f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{number(statistics.fmean(values))}{deviation}"


def draw(verdict: Verdict, file: Path) -> bool:
    """One panel a curve that the recipe names, a line an arm, the seeds behind it; False if there is nothing to draw."""
    panels = [name for name in verdict.recipe.draw if any(name in r.curves for rs in verdict.records.values() for r in rs)]
    if not panels:
        return False
    from matplotlib import pyplot as plt

    from opd_lightning.inspect.figures import STYLE  # and a backend that needs no display

    with plt.rc_context({**STYLE, "font.size": 10}):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels) + 0.4, 4.0), squeeze=False, layout="constrained")
        for place, name in zip(axes[0], panels, strict=True):
            for i, (arm, records) in enumerate(verdict.records.items()):
                curves = [r.curves[name] for r in records if r.curves.get(name)]
                for curve in curves:
                    place.plot(*zip(*curve, strict=True), color=f"C{i % 10}", lw=0.6, alpha=0.4)
                if curves:
                    place.plot(*_mean(curves), color=f"C{i % 10}", lw=1.8, label=arm)
            place.set_title(name.replace("_", " "), loc="left", fontsize=10)
            place.set_xlabel(verdict.recipe.over, fontsize=9)
        lines = {label: line for place in axes[0] for line, label in zip(*place.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
        figure.savefig(file)
        plt.close(figure)
    return True


def _mean(curves: list[list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    points = list(zip(*curves, strict=False))
    return [p[0][0] for p in points], [statistics.fmean(y for _, y in p) for p in points]


def write(folder: Path, verdict: Verdict, drawing: bool) -> None:
    """Page and figure of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = drawing and draw(verdict, folder / f"{verdict.recipe.name}.svg")
    (folder / f"{verdict.recipe.name}.md").write_text(page(verdict, drawn), encoding="utf-8")


def write_summary(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """``summary.md`` and ``summary.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(summary(verdicts) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(as_json(verdicts), encoding="utf-8")


def into(file: Path, verdicts: Sequence[Verdict]) -> None:
    """Put the table between the two markers of a page, and a recipe's own one between those with its name, if there are any.

    Raises:
        ValueError: if the page does not hold each marker once.
    """
    text = _between(file.read_text(encoding="utf-8"), BEGIN, END, summary(verdicts), file)
    for verdict in verdicts:
        begin, end = (mark.replace("reproduce", f"reproduce {short(verdict)}") for mark in (BEGIN, END))
        if begin in text:
            text = _between(text, begin, end, "\n".join(own_table(verdict)), file)
    file.write_text(text, encoding="utf-8")


def _between(text: str, begin: str, end: str, lines: str, file: Path) -> str:
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{file} must hold the markers {begin} and {end}, once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{lines}\n{end}{rest.partition(end)[2]}"
