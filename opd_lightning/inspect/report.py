"""What a run did: a table, `summary.json` and a one-page report, made from the run's folder alone.

So a run that was killed can be looked at (``opd report runs/mine``) and a report never needs the models again.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from opd_lightning.callbacks import run_card
from opd_lightning.configurable import Configurable
from opd_lightning.inspect import subrun

Curves = dict[str, list[tuple[int, float]]]
ROW_TITLES = {
    "before": "student before",
    "after": "student after",
    "opd": "student after OPD",
    "sft": "SFT control",
    "teacher": "teacher",
}
COLUMNS = {"accuracy": "accuracy", "reverse_kl": "reverse KL (nats/token)", "neutral_nll": "neutral text (nats/token)"}


class Report(Configurable):
    """What stands in the table at the end, and which controls are run for it.

    Args:
        label: name of this run's row.
        controls: row name -> configuration that is laid over this run's own and trained for comparison, on one device, e.g.
            ``{sft: methods/seqkd.yaml}``.
        fields: further keys of ``summary.json`` -> where they come from, as ``row.metric``, e.g.
            ``{kl_before: before.reverse_kl}``.
    """

    def __init__(
        self,
        label: str = "opd",
        controls: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
    ) -> None:
        self.label, self.controls, self.fields = label, controls or {}, fields or {}
        rows = ("before", *self.controls, label, "teacher")
        for key, source in self.fields.items():
            if source.partition(".")[0] not in rows or not source.partition(".")[2]:
                raise ValueError(f"report.fields.{key}={source!r}: write row.metric, with a row of {', '.join(rows)}")

    def finish(self, run: Path, argv: list[str]) -> None:
        """Train the controls with the run's own command line, then write and show everything."""
        for name, overlay in self.controls.items():
            self._control(run / "controls" / name, name, overlay, argv)
        self.show(run)

    def show(self, run: Path) -> None:
        """Write ``summary.json`` and ``report.html`` from the run's folder, and print the table."""
        summary = self.summary(run)
        if not summary:
            return
        if (card := run_card.load(run)) is not None:
            run_card.save(run, card)
        (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print("\n" + table(summary))
        page = write_page(run, summary, self.label, list(self.controls))
        if page is not None:
            print(f"\nreport   {page}")
        print(f"summary  {run / 'summary.json'}")

    def _control(self, folder: Path, name: str, overlay: str, argv: list[str]) -> None:
        """The same command with one more file, in a process of its own."""
        if (folder / "summary.json").is_file():
            return
        print(f"\ncontrol {name!r}: the same run with {overlay}", flush=True)
        words = [*_without_checkpoint(argv), "-c", overlay, "--trainer.default_root_dir", str(folder)]
        words += ["--report.controls", "{}", "--report.label", name, "--ckpt_path", "last"]
        words += ["--trainer.devices", "1", "--trainer.strategy", "auto"]
        done = subprocess.run(subrun.command(words), env=subrun.environment(), check=False)
        if done.returncode:
            print(f"control {name!r} failed (exit code {done.returncode}); its row is left out", file=sys.stderr)

    def summary(self, run: Path) -> dict[str, Any]:
        """Rows ``before``, one per control, this run's and ``teacher``, plus `fields`; empty without measurements."""
        own = _history(run)
        students = [r for r in own if r["who"] == "student"]
        if not students:
            return {}
        rows: dict[str, Any] = {"before": _metrics(students[0])}
        for name in self.controls:
            control = [r for r in _history(run / "controls" / name) if r["who"] == "student"]
            if control:
                rows[name] = _metrics(control[-1])
        rows[self.label] = _metrics(students[-1])
        if teachers := [r for r in own if r["who"] == "teacher"]:
            rows["teacher"] = _metrics(teachers[-1])
        for row in rows.values():
            if "neutral_nll" in row:
                row["neutral_nll_drift"] = row["neutral_nll"] - rows["before"]["neutral_nll"]
        extra: dict[str, Any] = {}
        for key, source in self.fields.items():
            name, _, metric = source.partition(".")
            if metric not in rows.get(name, {}):
                print(f"summary.json lacks {key}: row {name!r} has no {metric!r}", file=sys.stderr)
                continue
            *outer, last = key.split(".")
            place = extra
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = rows[name][metric]
        return {**rows, **extra}


def _without_checkpoint(argv: list[str]) -> list[str]:
    out, skip = [], False
    for word in argv:
        if not skip and word != "--ckpt_path" and not word.startswith("--ckpt_path="):
            out.append(word)
        skip = word == "--ckpt_path"
    return out


def _history(run: Path) -> list[dict[str, Any]]:
    file = run / "eval" / "history.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k not in ("who",)}


def is_row(value: Any) -> bool:
    """Whether an entry of a summary is a row of the table, not a field."""
    return isinstance(value, dict) and "completion_tokens" in value


def table(summary: dict[str, Any]) -> str:
    """The rows as text.

    >>> print(table({"before": {"accuracy": 0.25, "reverse_kl": 1.5, "completion_tokens": 9.0}}))
                    accuracy  reverse KL (nats/token)
    student before    25.0 %                   1.5000
    """
    rows = {k: v for k, v in summary.items() if is_row(v)}
    keys = [k for k in COLUMNS if any(k in row for row in rows.values())]
    keys += sorted({k for row in rows.values() for k in row if k.startswith("pass@")})
    lines = [["", *(COLUMNS.get(k, k) for k in keys)]]
    for name, row in rows.items():
        lines.append([ROW_TITLES.get(name, name), *(_shown(k, row.get(k)) for k in keys)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[0] = max(widths[0], 14)
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if key == "accuracy" or key.startswith("pass@") else f"{value:.4f}"


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
    for row in _history(run):
        if row["who"] == "student":
            for key, value in _metrics(row).items():
                if key != "step":
                    found[f"eval/{key}"][row["step"]] = value
    return {key: sorted(points.items()) for key, points in found.items()}


def can_draw(what: str) -> bool:
    """Whether matplotlib and jinja2 are there; says what is left out where they are not."""
    missing = [m for m in ("matplotlib", "jinja2") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"no {what}: {' and '.join(missing)} not installed (pip install 'opd_lightning[report]')")
    return not missing


def write_page(run: Path, summary: dict[str, Any], label: str, controls: list[str]) -> Path | None:
    """``report.html``, one file; None, with the reason, where matplotlib or jinja2 are missing."""
    if not can_draw("report.html"):
        return None
    from opd_lightning.inspect import page

    runs = {label: curves(run), **{name: curves(run / "controls" / name) for name in controls}}
    target = run / "report.html"
    target.write_text(page.render(run, summary, runs), encoding="utf-8")
    return target
