"""The report: one HTML file with everything in it; its script draws curves, heat maps and tokens."""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from opd_lightning.callbacks import run_card
from opd_lightning.inspect import doctor
from opd_lightning.inspect.runs import RECORDS, Run, grouped
from opd_lightning.metrics.catalog import define

Panel = dict[str, Any]
Groups = list[tuple[str, list[int]]]
PANELS: list[tuple[str, dict[str, str]]] = [
    ("Held-out accuracy", {"eval/accuracy": "accuracy"}),
    (
        "Held-out reverse KL (nats/token)",
        {"eval/reverse_kl": "reverse KL", "eval/coarse_reverse_kl": "of the top-k and a tail"},
    ),
    (
        "Reverse KL on rollouts (nats/token)",
        {"train/reverse_kl": "reverse KL", "train/coarse_reverse_kl": "of the top-k and a tail"},
    ),
    ("Entropy (nats/token)", {"train/student_entropy": "student", "train/teacher_entropy": "teacher"}),
    (
        "Agreement on the top-k",
        {
            "train/overlap": "overlap",
            "train/student_overlap_mass": "student mass",
            "train/teacher_overlap_mass": "teacher mass",
        },
    ),
    ("Completion length (tokens)", {"rollout/completion_tokens": "length"}),
    ("Truncated and repeated text", {"rollout/truncated": "truncated", "rollout/repetition": "repetition"}),
    ("Gradient norm", {"train/gradient_norm": "norm"}),
    ("Seconds", {"train/step_seconds": "step", "rollout/seconds": "rollout"}),
]
MAPS = [
    ("student_entropy", "Student entropy", "nats", "teacher_entropy"),
    ("teacher_entropy", "Teacher entropy", "nats", "student_entropy"),
    ("reverse_kl", "Reverse KL", "nats", ""),
    ("overlap", "Top-k overlap", "", ""),
]
"""Quantity, title, unit (none for a share), and the one that has the same colour scale."""
COLUMNS = {"accuracy": "accuracy", "reverse_kl": "reverse KL (nats/token)", "neutral_nll": "neutral text (nats/token)"}


def render(title: str, runs: Sequence[Run], table: str = "") -> str:
    """The page as one HTML text.

    Args:
        title: heading.
        runs: what is shown; those that differ in their seeds alone share a curve with its spread.
        table: HTML of the results; made of the runs' measurements where empty.
    """
    groups = grouped(runs)
    data = _data(runs, groups)
    tokens = any(run["tokens"] for run in data["runs"])
    sections = {
        "results": ("Results", table or numbers(*results(runs))),
        "alarms": ("Alarms", _alarms(runs)),
        "doctor": ("Before the run", "".join(doctor.section(run.folder) for run in runs)),
        "curves": ("Curves", _CURVES if data["panels"] else ""),
        "maps": ("Where in the completion", _MAPS if any(run["positions"] for run in data["runs"]) else ""),
        "tokens": ("Tokens", _TOKENS if tokens else ""),
        "samples": ("The same held-out prompts, before and after", _samples(runs)),
        "card": ("Run card", _cards(runs)),
        "config": ("Configuration", _configs(runs, groups)),
    }
    shown = {key: (name, body) for key, (name, body) in sections.items() if body}
    short = {"maps": "Positions", "samples": "Samples"}
    return _filled(
        _asset("report.html"),
        title=html.escape(title),
        subtitle=html.escape(_subtitle(runs)),
        css=_asset("report.css"),
        js=_asset("report.js") + _asset("tokens.js"),
        nav="".join(f'<a href="#{key}">{short.get(key, name)}</a>' for key, (name, _) in shown.items()),
        sections="\n".join(
            f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{name}</h2>{body}</section>'
            for key, (name, body) in shown.items()
        ),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return resources.files("opd_lightning.inspect").joinpath("assets", name).read_text(encoding="utf-8")


def _filled(template: str, **parts: str) -> str:
    """Every ``{{name}}`` of the template; what is filled in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(runs: Sequence[Run], groups: Groups) -> dict[str, Any]:
    found = [run.to_data(RECORDS // len(runs)) for run in runs]
    logged = {key for run in found for key in run["curves"]}
    panels = [_panel(title, {k: label for k, label in keys.items() if k in logged}) for title, keys in PANELS]
    others = logged - {key for _, keys in PANELS for key in keys}
    families: dict[str, dict[str, str]] = {}
    for key in sorted(others):
        phase, _, name = key.partition("/")
        family, _, part = name.rpartition("/")  # train/student_entropy/0-15
        joint = phase if phase in ("time", "alarm") else f"{phase}/{family or name}"
        families.setdefault(joint, {})[key] = part.replace("_", " ")
    return {
        "groups": [{"name": name, "runs": members} for name, members in groups],
        "runs": found,
        "panels": [panel for panel in panels if panel["keys"]],
        "others": [_panel(name.replace("_", " "), keys) for name, keys in families.items() if name != "alarm"],
        "maps": MAPS,
        "define": {key: define(key) for key in sorted(logged)},
    }


def _panel(title: str, keys: dict[str, str]) -> Panel:
    return {"title": title, "keys": list(keys.items())}


# ---- text ------------------------------------------------------------------------------------------------------------------
def _table(kind: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of results as HTML, the first column left-aligned."""
    return _table("numbers", [html.escape(cell) for cell in head], ([html.escape(cell) for cell in row] for row in rows))


def results(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Mean and standard deviation of the last measurement of each group, between the student before and the teacher: head and
    rows of a table.
    """
    rows: list[tuple[str, list[dict[str, float]]]] = []
    before = [found[0] for run in runs if (found := run.measured("student"))]
    rows.append(("student before", before))
    for name, members in grouped(runs):
        rows.append((name, [found[-1] for i in members if (found := runs[i].measured("student"))]))
    rows.append(("teacher", [found[-1] for run in runs if (found := run.measured("teacher"))]))
    keys = [k for k in COLUMNS if any(k in row for _, found in rows for row in found)]
    keys += sorted({k for _, found in rows for row in found for k in row if k.startswith("pass@")})
    head = ["", *(COLUMNS.get(k, k) for k in keys), "runs"]
    return head, [
        [name, *(spread(k, [row[k] for row in found if k in row]) for k in keys), str(len(found))]
        for name, found in rows
        if found
    ]


def spread(key: str, values: Sequence[float]) -> str:
    """Mean and, for two or more values, standard deviation.

    >>> spread("accuracy", [0.5, 0.6]), spread("reverse_kl", [0.25])
    ('55.0 ± 7.1 %', '0.2500')
    """
    if not values:
        return ""
    share = key == "accuracy" or key.startswith("pass@")
    scale, form = (100.0, ".1f") if share else (1.0, ".4f")
    text = format(scale * statistics.fmean(values), form)
    if len(values) > 1:
        text += f" ± {format(scale * statistics.stdev(values), form)}"
    return text + (" %" if share else "")


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return ", ".join(run.name for run in runs)
    card = runs[0].card
    if card is None:
        return str(runs[0].folder)
    rang = len(runs[0].alarms)
    alarms = "no alarm rang" if not rang else "1 alarm rang" if rang == 1 else f"{rang} alarms rang"
    return f"{card['status']}, step {card['step']}; {alarms}; descends: {card['items']['realization']['declared target']}"


def _alarms(runs: Sequence[Run]) -> str:
    rows = [
        [html.escape(text) for text in (run.name, str(a["step"]), a["alarm"].replace("_", " "), a["what"], a["advice"])]
        for run in runs
        for a in run.alarms
    ]
    if not rows:
        watched = [run for run in runs if run.card]
        return "<p>No alarm rang.</p>" if watched else ""
    head = ["run", "step", "alarm", "what was seen", "what to do next"]
    first = int(len(runs) == 1)  # one run needs no name
    return _table("text", head[first:], [row[first:] for row in rows])


def _cards(runs: Sequence[Run]) -> str:
    """The cards side by side; what is the same in all of them is written once."""
    cards = [(run, card) for run in runs if (card := run.card) is not None]
    if not cards:
        return ""
    head = "".join(
        f'<th scope="col">{html.escape(run.name)}: {html.escape(card["status"])}, step {card["step"]}</th>'
        for run, card in cards
    )
    rows = []
    titles = dict.fromkeys(title for _, card in cards for title in card["items"])
    for number, title in enumerate(titles, 1):
        rows.append(f'<tr><th class="item" colspan="{len(cards) + 1}">{number}. {html.escape(title)}</th></tr>')
        items = [dict(run_card.rows(card["items"].get(title, {}))) for _, card in cards]
        for field in dict.fromkeys(field for item in items for field in item):
            values = [html.escape(item.get(field, "")) for item in items]
            cells = "".join(f'<td class="differs">{value}</td>' for value in values)
            if len(set(values)) == 1:
                cells = f'<td colspan="{len(cards)}">{values[0]}</td>'
            rows.append(f'<tr><th scope="row">{html.escape(field)}</th>{cells}</tr>')
    summary = "the 21 items" if len(cards) == 1 else "the 21 items side by side; marked where the runs differ"
    return (
        f'<details><summary>{summary}</summary><div class="scroll"><table class="text"><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div></details>"
    )


def _configs(runs: Sequence[Run], groups: Groups) -> str:
    firsts = [(name, runs[members[0]]) for name, members in groups if runs[members[0]].config]
    return "".join(
        f"<details><summary>{html.escape(name)}: {html.escape(str(run.folder / 'config.yaml'))}</summary>"
        f"<pre>{html.escape(run.config)}</pre></details>"
        for name, run in firsts
    )


def _samples(runs: Sequence[Run], count: int = 6) -> str:
    """The first held-out prompts: before, and after each run."""
    found = [(run, files) for run in runs if len(files := sorted((run.folder / "eval").glob("student-*.jsonl"))) > 1]
    if not found:
        return ""
    columns = [("before", _lines(found[0][1][0], count)), *((run.name, _lines(files[-1], count)) for run, files in found[:4])]
    columns = [(name if len(found) > 1 or name == "before" else "after", lines) for name, lines in columns]
    rows = []
    for place in zip(*(lines for _, lines in columns), strict=False):
        if len({line["prompt"] for line in place}) > 1:
            break  # other runs measure other prompts
        rows.append([_mono(place[0]["prompt"], ""), *(_mono(line["completion"], _mark(line["score"])) for line in place)])
    return _table("text", ["prompt", *(html.escape(name) for name, _ in columns)], rows) if rows else ""


def _lines(file: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def _mark(score: float) -> str:
    return "" if score != score else "right" if score >= 1.0 else "wrong"


def _mono(text: str, mark: str) -> str:
    said = f' <span class="note">({mark})</span>' if mark else ""
    return f'<span class="mono {mark}">{html.escape(text)}</span>{said}'


# ---- what the script fills ---------------------------------------------------------------------------------------------------
_CURVES = """<div class="bar"><div id="legend" class="legend" role="group" aria-label="Runs shown"></div>
<label>smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0">
<output id="smoothing-value">off</output></label>
<label><input id="log" type="checkbox"> logarithmic</label></div>
<p class="note">Arrow keys move along a focused curve. A red dotted line is an alarm. Smoothing leaves held-out measurements
alone.</p>
<div id="panels" class="panels"></div>
<details id="more"><summary>all other curves</summary><div id="others" class="panels"></div></details>"""
_MAPS = """<p class="note">Means over the completion tokens of a stretch of steps; position counts from the first token of the
completion, downwards. Both entropies share one scale. Empty: no completion was that long.</p>
<div id="maps-panels" class="panels"></div>"""
_TOKENS = """<div class="bar"><label>run <select id="run"></select></label>
<label>step <input id="step" type="range" min="0" max="0" value="0"> <output id="step-value"></output></label>
<span>rollout <span id="rows" class="legend" role="group" aria-label="Rollouts of this step"></span></span>
<label>colour <select id="kind"></select></label></div>
<div id="scale" class="bar"></div>
<div id="viewer" class="viewer"><div><div id="toks" class="toks" role="group" aria-label="Prompt and completion"></div>
<p id="about" class="note"></p>
<details id="teacher-prompt"><summary>what the teacher reads instead of the prompt</summary><pre></pre></details></div>
<aside id="detail" class="detail" aria-live="polite" aria-label="The token under the pointer"></aside></div>
<p class="note">Point at a token, or move with the arrow keys, to see both models' likeliest tokens there; the drawn one is
underlined.</p>"""
