"""What a run did: a table, `summary.json` and a one-page report, made from the run's folder alone.

So a run that was killed can be looked at (``opd report runs/mine``) and a report never needs the models again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from opd_lightning.callbacks import run_card
from opd_lightning.configurable import Configurable
from opd_lightning.inspect import page, subrun
from opd_lightning.inspect.page import COLUMNS, spread
from opd_lightning.inspect.runs import Run, history, metrics, named

ROW_TITLES = {
    "before": "student before",
    "after": "student after",
    "opd": "student after OPD",
    "sft": "SFT control",
    "teacher": "teacher",
}


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
        print(f"\nreport   {write_page(run, summary, self.label, list(self.controls))}")
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
        own = history(run)
        students = [r for r in own if r["who"] == "student"]
        if not students:
            return {}
        rows: dict[str, Any] = {"before": metrics(students[0])}
        for name in self.controls:
            control = [r for r in history(run / "controls" / name) if r["who"] == "student"]
            if control:
                rows[name] = metrics(control[-1])
        rows[self.label] = metrics(students[-1])
        if teachers := [r for r in own if r["who"] == "teacher"]:
            rows["teacher"] = metrics(teachers[-1])
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


def is_row(value: Any) -> bool:
    """Whether an entry of a summary is a row of the table, not a field."""
    return isinstance(value, dict) and "completion_tokens" in value


def table(summary: dict[str, Any]) -> str:
    """The rows as text.

    >>> print(table({"before": {"accuracy": 0.25, "reverse_kl": 1.5, "completion_tokens": 9.0}}))
                    accuracy  reverse KL (nats/token)
    student before    25.0 %                   1.5000
    """
    return _aligned(*_cells(summary))


def _cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    rows = {k: v for k, v in summary.items() if is_row(v)}
    keys = [k for k in COLUMNS if any(k in row for row in rows.values())]
    keys += sorted({k for row in rows.values() for k in row if k.startswith("pass@")})
    head = ["", *(COLUMNS.get(k, k) for k in keys)]
    return head, [
        [ROW_TITLES.get(name, name), *(spread(k, [row[k]] if k in row else []) for k in keys)] for name, row in rows.items()
    ]


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    widths[0] = max(widths[0], 14)
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def can_draw(what: str) -> bool:
    """Whether matplotlib is there; says what is left out where it is not."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        print(f"no {what}: matplotlib is not installed (pip install 'opd_lightning[report]')")
    return there


def write_page(run: Path, summary: dict[str, Any], label: str, controls: list[str]) -> Path:
    """``report.html``: the run beside its controls."""
    runs = [Run(label, run), *(Run(name, run / "controls" / name) for name in controls)]
    runs = [one for one in runs if one.folder.is_dir()]
    target = run / "report.html"
    target.write_text(page.render(run.name, runs, page.numbers(*_cells(summary))), encoding="utf-8")
    return target


def compare(folders: list[Path], out: Path | None) -> None:
    """Several runs on one page, and their results on the terminal. Runs that differ in their seeds alone are put together.

    Args:
        folders: of the runs.
        out: the page; None puts ``comparison.html`` into the folder above all of them.
    """
    target = out or Path(os.path.commonpath([folder.resolve() for folder in folders])) / "comparison.html"
    runs = named(folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.render(f"{len(runs)} runs side by side", runs), encoding="utf-8")
    print(_aligned(*page.results(runs)))
    print(f"\nreport   {target}")
