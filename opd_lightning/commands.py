"""Verbs of ``opd`` that build no module of their own: listing configurations, reports, the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from opd_lightning import configfiles
from opd_lightning.zoo.build import build, show


def configs() -> None:
    """List the configurations that ship with the package, one line each."""
    files = configfiles.shipped()
    width = max(map(len, files))
    group = ""
    for name, file in files.items():
        if name.partition("/")[0] != group and "/" in name:
            group = name.partition("/")[0]
            print()
        print(f"{name.ljust(width)}  {configfiles.summary(file)}")
    print("\nUse one with `opd fit -c NAME`; lay several over each other with several -c, the later one wins.")


def report(run: str, label: str = "opd", controls: list[str] | None = None) -> None:
    """Write summary.json and report.html of a run from its folder, also of one that was killed.

    Args:
        run: folder of the run, e.g. runs/quickstart.
        label: name of the run's row.
        controls: names of the controls below <run>/controls; all that are there if left out.
    """
    from opd_lightning.inspect.report import Report

    folder = Path(run)
    if not (folder / "eval" / "history.json").is_file():
        raise FileNotFoundError(f"{folder} holds no measurements (eval/history.json): is it the folder of a run?")
    found = sorted(f.name for f in (folder / "controls").glob("*") if f.is_dir())
    chosen = Report(label, dict.fromkeys(controls or found, ""))
    chosen.show(folder)


COMMANDS: dict[str, Any] = {"configs": configs, "report": report, "zoo": {"build": build, "list": show}}


def run(argv: list[str]) -> int:
    """Run one of `COMMANDS` with its arguments."""
    auto_cli(COMMANDS[argv[0]], args=argv[1:], prog=f"opd {argv[0]}", as_positional=True)
    return 0
