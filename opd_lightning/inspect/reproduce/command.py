"""The words of ``opd reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from opd_lightning.inspect.report import can_draw
from opd_lightning.inspect.reproduce import page, recipe
from opd_lightning.inspect.reproduce.run import FAILED, OPEN, Plan, Verdict, run

ABOUT = """Tests claims of the literature at a small scale: bigram tables, enumerable worlds, and transformers of 28 thousand
parameters that learn sums of digits, each with several seeds and the criteria that stand in its file. Where one was set
after a result had been seen, the note in the file says so.

  opd reproduce R1              one claim, with the networks that it needs
  opd reproduce R6 R7 A1        some
  opd reproduce --all --jobs 2  all of them, two at a time
  opd reproduce --list          what there is

A claim passes if all its criteria hold, on means over the seeds where nothing else is said. One that does not is a null and is
shown with its figures."""
ENDING = """The folder holds a page and a figure a claim, summary.md, summary.json, and a record of every measurement.
Stopped? The same command goes on where it was; arms that claims share are measured once.
A claim of your own is a YAML file like those in configs/reproduce: opd reproduce mine.yaml
exit code: 0 all measured, pass or null; 1 something failed; 2 refused; 130 or 143 stopped"""


def main(words: list[str]) -> int:
    """``opd reproduce``."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("opd reproduce", description=ABOUT, epilog=ENDING, formatter_class=layout)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="R1, r1_success, or a file of your own")
    add("--all", action="store_true", help="every claim that ships")
    add("--list", action="store_true", help="show what ships and stop")
    add("--seeds", nargs="+", type=int, default=[], help="of every arm (default: those of the recipe, at least 3)")
    add("--folder", type=Path, default=Path("runs/reproduce"), help="where everything goes (default: %(default)s)")
    add("--jobs", type=int, default=1, help="measurements at a time, one core each (default: %(default)s)")
    add("--json", action="store_true", help="print the verdicts with all figures as plain data")
    add("--table", type=Path, metavar="PAGE.md", help="put the table between the two markers of a page; nothing is run")
    given = parser.parse_args(words)
    if given.list:
        print("\n".join(f"{name:24} {recipe.load(file).title}" for name, file in recipe.files().items()))
        return 0
    if given.all == bool(given.names):
        parser.error("name some claims, or --all for every one (see --list)")
    if given.jobs < 1 or any(seed < 0 for seed in given.seeds):
        parser.error(f"--jobs {given.jobs} --seeds {given.seeds}: at least one job, seeds of 0 or more")
    chosen = recipe.files().values() if given.all else [recipe.find(name) for name in given.names]
    recipes = [recipe.load(file) for file in dict.fromkeys(chosen)]
    plan = Plan(recipes, recipe.networks(given.folder / "networks", recipes), given.folder, given.seeds)
    drawing = can_draw("the figures")
    errors: dict[Path, str] = {}
    if given.table is None:
        shown: set[str] = set()
        errors = run(plan, given.jobs, lambda found: _publish(plan, found, drawing, shown))
    verdicts = [plan.verdict(r, errors) for r in recipes]
    if given.table is not None:
        if unfinished := [v.recipe.name for v in verdicts if v.status == OPEN]:
            raise ValueError(f"{given.folder} lacks measurements of {', '.join(unfinished)}: run `opd reproduce` first")
        page.into(given.table, verdicts)
        return 0
    for verdict in verdicts:
        if verdict.status != OPEN:
            page.write(given.folder, verdict, drawing)
    page.write_summary(given.folder, verdicts)
    print(page.as_json(verdicts) if given.json else f"{page.terminal(verdicts)}\n\npages  {given.folder / 'summary.md'}")
    return 1 if any(v.status == FAILED for v in verdicts) else 0


def _publish(plan: Plan, errors: dict[Path, str], drawing: bool, shown: set[str]) -> None:
    """Write the page of a claim as soon as its last arm is over."""
    for one in plan.recipes:
        verdict: Verdict = plan.verdict(one, errors)
        if verdict.status != OPEN and one.name not in shown:
            shown.add(one.name)
            page.write(plan.folder, verdict, drawing)
