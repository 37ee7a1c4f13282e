"""The one-page report: table, curves, samples, configuration; no file beside it, no network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt

from opd_lightning.callbacks.run_card import load
from opd_lightning.callbacks.run_card import rows as rows_of
from opd_lightning.inspect.report import COLUMNS, ROW_TITLES, Curves, _shown, is_row
from opd_lightning.metrics.catalog import define

PANELS: list[tuple[str, list[str]]] = [
    ("Held-out accuracy", ["eval/accuracy"]),
    ("Held-out reverse KL", ["eval/reverse_kl"]),
    ("Reverse KL on rollouts", ["train/reverse_kl"]),
    ("Entropy", ["train/student_entropy", "train/teacher_entropy"]),
    ("Agreement on the top-k", ["train/overlap", "train/student_overlap_mass", "train/teacher_overlap_mass"]),
    ("Completion length", ["rollout/completion_tokens"]),
    ("Gradient norm", ["train/gradient_norm"]),
    ("Seconds", ["train/step_seconds", "rollout/seconds"]),
]
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
 table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .9em; border-bottom: 1px solid #ddd; }
 th { text-align: right; } td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child { text-align: left; }
 .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1em; }
 figure { margin: 0; } figcaption { font-size: 12px; color: #666; } svg { width: 100%; height: auto; }
 pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 13px; }
 .samples td { text-align: left; vertical-align: top; font-family: ui-monospace, monospace; font-size: 13px;
               white-space: pre-wrap; overflow-wrap: anywhere; }
 .card td, .card th { text-align: left; vertical-align: top; overflow-wrap: anywhere; font-size: 13px; }
 .wrong { color: #a33; } .right { color: #2a7; }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr><th></th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<div class="panels">{% for panel in panels %}
<figure>{{ panel.svg }}<figcaption>{{ panel.caption }}</figcaption></figure>{% endfor %}</div>
{% if samples %}<h2>The same held-out prompts, before and after</h2>
<table class="samples"><tr><th>prompt</th><th>before</th><th>after</th></tr>
{% for s in samples %}<tr><td>{{ s.prompt }}</td><td class="{{ s.mark_before }}">{{ s.before }}</td>
<td class="{{ s.mark_after }}">{{ s.after }}</td></tr>{% endfor %}</table>{% endif %}
{% if card %}<h2>Run card</h2><details><summary>{{ card.status }}, step {{ card.step }}; {{ alarms }}</summary>
<table class="card">{% for item, fields in items %}<tr><th colspan="2">{{ loop.index }}. {{ item }}</th></tr>
{% for field, value in fields %}<tr><td>{{ field }}</td><td>{{ value }}</td></tr>{% endfor %}{% endfor %}
</table></details>{% endif %}
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{{ config }}</pre></details>
</body></html>
"""


def render(run: Path, summary: dict[str, Any], runs: dict[str, Curves]) -> str:
    """The page as one HTML text."""
    rows = {k: v for k, v in summary.items() if is_row(v)}
    keys = [k for k in COLUMNS if any(k in row for row in rows.values())]
    panels = []
    for title, metrics in PANELS:
        if any(m in found for found in runs.values() for m in metrics):
            caption = " ".join(f"{m.partition('/')[2]}: {define(m)}" for m in metrics)
            panels.append({"svg": Markup(_panel(title, metrics, runs)), "caption": caption})
    config, card = run / "config.yaml", load(run)
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return template.render(
        title=run.name,
        columns=[COLUMNS[k] for k in keys],
        rows=[[ROW_TITLES.get(name, name), *(_shown(k, row.get(k)) for k in keys)] for name, row in rows.items()],
        panels=panels,
        samples=_samples(run),
        card=card,
        items=[(name, rows_of(item)) for name, item in card["items"].items()] if card else [],
        alarms=_rang(card),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _panel(title: str, metrics: list[str], runs: dict[str, Curves]) -> str:
    """One set of axes as SVG: solid lines for the run, dashed ones for its controls."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 2.7), layout="constrained")
        for number, (name, found) in enumerate(runs.items()):
            for metric in metrics:
                if metric in found:
                    steps, values = zip(*found[metric], strict=True)
                    short = metric.partition("/")[2].replace("_", " ")
                    label = name if len(metrics) == 1 else f"{short} ({name})" if len(runs) > 1 else short
                    marker = "o" if len(steps) < 20 else None
                    axes.plot(steps, values, "--" if number else "-", label=label, marker=marker, markersize=3, linewidth=1.4)
        axes.set_title(title, loc="left")
        axes.set_xlabel("optimizer step")
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _rang(card: dict[str, Any] | None) -> str:
    fired: Any = card["items"]["stability"]["alarms"] if card else "none"
    return "no alarm rang" if fired == "none" else ", ".join(f"{a['alarm']} rang at step {a['step']}" for a in fired)


def _samples(run: Path, count: int = 6) -> list[dict[str, str]]:
    files = sorted((run / "eval").glob("student-*.jsonl"))
    if len(files) < 2:
        return []
    before, after = (
        [json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()[:count]] for f in (files[0], files[-1])
    )

    def mark(record: dict[str, Any]) -> str:
        return "" if record["score"] != record["score"] else "right" if record["score"] >= 1.0 else "wrong"

    return [
        {
            "prompt": old["prompt"],
            "before": old["completion"],
            "after": new["completion"],
            "mark_before": mark(old),
            "mark_after": mark(new),
        }
        for old, new in zip(before, after, strict=False)
    ]
