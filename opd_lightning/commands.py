"""Verbs of ``opd`` that build no module of their own: listing configurations, reports, races, the zoo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from opd_lightning import configfiles
from opd_lightning.inspect.race import Resolve, Settings
from opd_lightning.inspect.race import run as run_race
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


RACE = """Train every method with every seed, each as a run of its own with the same number of completions, and compare them:
mean and standard deviation of held-out accuracy and reverse KL over the seeds, with the tokens that each run trained on.

  opd race -c quickstart.yaml --methods methods/opd.yaml methods/gkd.yaml methods/seqkd.yaml --seeds 0 1 2 --max_steps 100

Every run is `opd fit` with the configurations, then the method's, then the flags; evaluation between the first and the last
step, sample tables and report controls are off. Give each method the learning rate that suits it, in its own file, or the
comparison is one of learning rates."""
RACE_ENDING = """The folder holds race.md, race.csv, race.png and race.svg, kept up to date after every run, and each run with
its log. Stopped or failed? The same command continues: finished runs are not repeated, interrupted ones go on from their
checkpoint, and a run whose configuration changed starts anew (the old one is moved aside).
Exit code: 0 all finished, 1 some failed, 2 refused before the first run, 130 or 143 stopped."""


def race(argv: list[str], resolve: Resolve) -> int:
    """Train several methods with several seeds and compare them (see `RACE`)."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "opd race", description=RACE, epilog=RACE_ENDING, formatter_class=plain, allow_abbrev=False
    )
    parser.usage = (
        "opd race -c CONFIG --methods METHOD ... --seeds SEED ... [--max_steps N] [--folder FOLDER] [any flag of opd fit]"
    )
    add = parser.add_argument
    add(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="CONFIG",
        help="below all runs: models, data, optimizer; repeatable",
    )
    add("--methods", nargs="*", default=[], metavar="METHOD", help="configurations laid over it; `all` for all that ship")
    add("--seeds", nargs="*", default=[], type=int, metavar="SEED", help="of each method, three or more for honest spreads")
    add("--max_steps", type=int, metavar="N", help="optimizer steps of a run (default: the configuration's)")
    add("--folder", type=Path, default=Path("runs/race"), help="where everything goes (default: %(default)s)")
    given, flags = parser.parse_known_args(argv)
    settings = Settings(given.config, given.methods, given.seeds, given.folder, given.max_steps, tuple(flags))
    return 0 if run_race(settings, resolve) else 1


COMMANDS: dict[str, Any] = {"configs": configs, "race": race, "report": report, "zoo": {"build": build, "list": show}}


def run(argv: list[str], resolve: Resolve) -> int:
    """Run one of `COMMANDS` with its arguments; ``resolve`` reads configurations as ``opd fit`` does."""
    if argv[0] == "race":
        return race(argv[1:], resolve)
    auto_cli(COMMANDS[argv[0]], args=argv[1:], prog=f"opd {argv[0]}", as_positional=True)
    return 0
