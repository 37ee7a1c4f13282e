"""Verbs of ``opd`` that train nothing themselves: configurations, reports, races, the zoo, audits."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from opd_lightning import configfiles
from opd_lightning.inspect.race import Settings
from opd_lightning.inspect.race import run as run_race
from opd_lightning.inspect.setups import side_by_side
from opd_lightning.preflight import Reader, doctor, inspect_pair, pick_teacher, understood, verb
from opd_lightning.zoo.build import build, show


def configs(words: list[str], read: Reader) -> int:
    """``opd configs``."""
    about = "Lists the configurations that ship with the package, one line each."
    parser = verb("configs", about, config=False)
    parser.add_argument(
        "--methods", action="store_true", help="the methods as a table: states, divergence, support, credit, ..."
    )
    parser.add_argument("--measure", metavar="FILE.md", type=Path, help="write bias and noise of every method there (a minute)")
    given = parser.parse_args(words)
    if given.methods or given.measure:
        from opd_lightning.inspect import catalogue

        methods = catalogue.shipped(read)
        if given.measure:
            given.measure.write_text(catalogue.measured_page(methods), encoding="utf-8")
            print(f"wrote {given.measure}")
        else:
            print(catalogue.markdown([method.row() for method in methods]))
        return 0
    files = configfiles.shipped()
    width = max(map(len, files))
    group = ""
    for name, file in files.items():
        if name.partition("/")[0] != group and "/" in name:
            group = name.partition("/")[0]
            print()
        print(f"{name.ljust(width)}  {configfiles.summary(file)}")
    print("\nUse one with `opd fit -c NAME`; lay several over each other with several -c, the later one wins.")
    return 0


REPORT = """Writes what a run did into one HTML file that needs no network: results, curves, heat maps of entropy, KL and
agreement by step and position, a few rollouts token by token, alarms and run card. From the run's folder alone, also of one
that was killed.

Of one run, with its controls: summary.json and report.html into its folder. Of several: one page with all of them side by side;
runs that differ in their seeds alone share a curve, its band is the standard deviation."""


def report(words: list[str], read: Reader) -> int:
    """``opd report``."""
    parser = verb("report", REPORT, "example: opd report runs/quickstart runs/other", config=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, e.g. runs/quickstart")
    parser.add_argument("--label", default="opd", help="name of the run's row, for one run (default: %(default)s)")
    parser.add_argument("--controls", nargs="*", help="controls below RUN/controls that are shown (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="of several runs (default: comparison.html above them)")
    given = parser.parse_args(words)
    from opd_lightning.inspect.report import Report, compare

    for folder in given.runs:
        if not (folder / "eval" / "history.json").is_file() and (len(given.runs) == 1 or not (folder / "logs").is_dir()):
            raise FileNotFoundError(f"{folder} holds no measurements (eval/history.json): is it the folder of a run?")
    if len(given.runs) > 1:
        compare(given.runs, given.out)
        return 0
    found = sorted(f.name for f in (given.runs[0] / "controls").glob("*") if f.is_dir())
    Report(given.label, dict.fromkeys(found if given.controls is None else given.controls, "")).show(given.runs[0])
    return 0


RACE = """Train every method with every seed, each as a run of its own with the same number of completions, and compare them:
mean and standard deviation of held-out accuracy and reverse KL over the seeds, with the tokens that each run trained on.

  opd race -c quickstart.yaml --methods methods/opd.yaml methods/gkd.yaml methods/seqkd.yaml --seeds 0 1 2 --max_steps 100

Every run is `opd fit` with the configurations, then the method's, then the flags; evaluation between the first and the last
step, sample tables and report controls are off. With --eval.every_n_steps 20 the way there is measured too: race_courses.csv
and race_courses.png show it against the tokens trained on and the seconds they took, evaluation left out. Give each method
the learning rate that suits it, in its own file, or the comparison is one of learning rates."""
RACE_ENDING = """The folder holds race.md, race.csv, race.png and race.svg, kept up to date after every run, and each run with
its log. Stopped or failed? The same command continues: finished runs are not repeated, interrupted ones go on from their
checkpoint, and a run whose configuration changed starts anew (the old one is moved aside).
Exit code: 0 all finished, 1 some failed, 2 refused before the first run, 130 or 143 stopped."""


def race(argv: list[str], read: Reader) -> int:
    """Train several methods with several seeds and compare them (see `RACE`)."""
    parser = verb("race", RACE, RACE_ENDING)
    parser.usage = (
        "opd race -c CONFIG --methods METHOD ... --seeds SEED ... [--max_steps N] [--folder FOLDER] [any flag of opd fit]"
    )
    add = parser.add_argument
    add("--methods", nargs="*", default=[], metavar="METHOD", help="configurations laid over it; `all` for all that ship")
    add("--seeds", nargs="*", default=[], type=int, metavar="SEED", help="of each method, three or more for honest spreads")
    add("--max_steps", type=int, metavar="N", help="optimizer steps of a run (default: the configuration's)")
    add("--folder", type=Path, default=Path("runs/race"), help="where everything goes (default: %(default)s)")
    given, flags = parser.parse_known_args(argv)
    settings = Settings(given.config, given.methods, given.seeds, given.folder, given.max_steps, tuple(flags))
    return 0 if run_race(settings, read) else 1


AUDIT_HELP = """
Audits a token loss of your own: its gradient is computed on every completion of a small world and compared with exact ones.

    opd audit-loss my_loss.py:distill

with, in my_loss.py,

    def distill(student_logits, teacher_logits, tokens, mask):
        p = student_logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        q = teacher_logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return ((p - q).detach() * p * mask).sum() / mask.sum()

Logits are [B, T, V], tokens and mask [B, T]; position t scores tokens[:, t], so nothing is shifted; the mask is True at
completion tokens; the scalar is minimised. A top-k loss shows what it does only if its k is smaller than --vocab.
"""
AUDIT_EXIT = """
It says which gradient the loss follows in expectation over the student's own samples, how noisy it is, whether the teacher is
in the gradient, whether padding leaks, and whether logits of -inf break it; and it names well-known defects.

exit code: 0 no defect found, 1 a defect was found, 2 the loss cannot be audited
"""


def audit_loss(words: list[str], read: Reader) -> int:
    """``opd audit-loss``."""
    parser = verb("audit-loss", AUDIT_HELP, AUDIT_EXIT, config=False)
    parser.add_argument("loss", metavar="FILE.py:FUNCTION", help="the loss to audit")
    parser.add_argument("--json", action="store_true", help="print plain data instead of a table")
    parser.add_argument("--vocab", type=int, default=5, help="tokens of the small world, 4 to 16 (default: 5)")
    given = parser.parse_args(words)
    from opd_lightning.inspect.audit import audit
    from opd_lightning.inspect.audit_text import load_loss, table

    found = audit(load_loss(given.loss), given.vocab)
    print(json.dumps(found.to_dict(), indent=2) if given.json else table(found, given.loss))
    return 0 if found.sound else 1


def diff(words: list[str], read: Reader) -> int:
    """``opd diff``."""
    about = "Compares two configurations in terms of what they train: only what differs, then what each of them descends."
    parser = verb("diff", about, "example: opd diff methods/opd.yaml methods/gkd.yaml", config=False)
    parser.add_argument("first", help="a configuration: a file, or a shipped name (see `opd configs`)")
    parser.add_argument("second", help="another one")
    given = parser.parse_args(words)
    setups = []
    for name in (given.first, given.second):
        try:
            setups.append(read(["-c", name]))
        except (Exception, SystemExit):
            print(f"opd diff: the configuration that cannot be used is {name}", file=sys.stderr)
            raise
    print(side_by_side((given.first, given.second), (setups[0], setups[1]), shutil.get_terminal_size((120, 24)).columns))
    return 0


def validate_config(words: list[str], read: Reader) -> int:
    """``opd validate-config``."""
    about = "Checks the configuration of a run without loading any weights, and says what it descends."
    more = (
        "example: opd validate-config -c quickstart.yaml --model.objective.support SampledToken\n"
        "All other keys of `opd fit` are understood too. exit code: 0 accepted, 2 refused, with the line to write instead"
    )
    _, flags = understood(verb("validate-config", about, more), words)
    print("\n".join(read(flags).declared()))
    return 0


FLOOR = """Trains a toy student towards a teacher that is told more: one rule for all rows, or another answer for every row, in
both directions of the KL. Prints how much of the divergence goes, the floor that the closed form gives, and whether what was
learned reaches contexts that were never trained on. The folder gets floor.json and floor.png.

With -c it is the floor of a configuration instead: the teacher is asked, at what the untrained student writes, under what it is
told about the row and under what it is told about other rows."""


def pi_floor(words: list[str], read: Reader) -> int:
    """``opd pi-floor``."""
    ending = "example: opd pi-floor -c methods/opsd.yaml\nwith -c, other keys of `opd fit` are understood"
    parser = verb("pi-floor", FLOOR, ending)
    parser.add_argument("--rows", type=int, default=16, help="with -c: rows of the training set (default: %(default)s)")
    parser.add_argument("--tellings", type=int, default=8, help="with -c: the row's own and others' (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/pi_floor"), help="where it writes (default: %(default)s)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="worlds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each training (default: %(default)s)")
    given, flags = understood(parser, words)
    if given.config:
        from opd_lightning.inspect.tellings import estimate

        print(estimate(read(flags), given.rows, given.tellings))
        return 0
    if flags:
        parser.error(f"unrecognized arguments without -c: {' '.join(flags)}")
    from opd_lightning.inspect import floor

    print(floor.table(floor.run(given.folder, given.seeds, given.steps)))
    print(f"plot: {given.folder / 'floor.png'}")
    return 0


def reproduce(words: list[str], read: Reader) -> int:
    """``opd reproduce``."""
    from opd_lightning.inspect.reproduce.command import main

    return main(words)


DRILL = """Runs a few steps of a configuration, then interrupts copies of it at every kind of moment, resumes each and compares
it with the first bit for bit: rollouts, losses, logged metrics, weights, optimizer.

Models, data, objective, callbacks and strategy are the configuration's; for the drill, a cold start lasts one refresh,
evaluations see at most 16 held-out prompts and come every few steps, and so do checkpoints."""
DRILL_ENDING = """
example: opd resume-drill -c quickstart.yaml --ways SIGKILL
All other keys of `opd fit` are understood too. Two runs a case, 21 cases at most.
exit code: 0 all equal, 1 something differs, 2 refused, or the run fails without any interruption
"""


def resume_drill(words: list[str], read: Reader) -> int:
    """``opd resume-drill``."""
    from opd_lightning.inspect import drill
    from opd_lightning.inspect.moments import MOMENTS

    parser = verb("resume-drill", DRILL, DRILL_ENDING)
    add = parser.add_argument
    add("--moments", nargs="+", choices=list(MOMENTS), default=list(MOMENTS), help="where (default: all)")
    add("--ways", nargs="+", choices=drill.WAYS, default=list(drill.WAYS), help="how (default: all)")
    add("--folder", type=Path, help="keep all runs there (default: a temporary folder, kept only if something differs)")
    add("--json", action="store_true", help="print plain data instead of a table")
    given, flags = understood(parser, words)
    outcomes, absent = drill.run(flags, read(flags), given.folder, given.moments, given.ways, drill.progress)
    print(drill.as_json(outcomes, absent) if given.json else drill.table(outcomes, absent))
    return 0 if all(not o.differs for o in outcomes) else 1


def serve_teacher(words: list[str], read: Reader) -> int:
    """``opd serve-teacher``."""
    from opd_lightning.models import serving

    return serving.main(words)


COMMANDS: dict[str, Any] = {"zoo": {"build": build, "list": show}}
"""Verbs whose arguments are read from the signature."""
OWN_PARSER: dict[str, Callable[[list[str], Reader], int]] = {
    "audit-loss": audit_loss,
    "configs": configs,
    "diff": diff,
    "doctor": doctor,
    "inspect-pair": inspect_pair,
    "pi-floor": pi_floor,
    "pick-teacher": pick_teacher,
    "race": race,
    "report": report,
    "reproduce": reproduce,
    "resume-drill": resume_drill,
    "serve-teacher": serve_teacher,
    "validate-config": validate_config,
}
"""Verbs that read their own words and return the exit code."""


OVERVIEW = """
verbs that train nothing themselves:
    configs             List what ships, or the methods as a table with their bias and noise.
    validate-config     Check a configuration without loading weights, and say what it descends.
    doctor              Examine a run before it starts: will it work, what to change if not, how long, how much memory.
    inspect-pair        Show both prompts of a row side by side, as student and teacher read them.
    diff                Compare two configurations in terms of what they train.
    pi-floor            Show in a toy, or estimate for a run, what a student can learn from a teacher that is told more.
    pick-teacher        Rank teachers for one student by what it would learn from each.
    race                Train several methods with several seeds and compare them.
    reproduce           Test claims of the literature at a small scale, with criteria and seeds.
    resume-drill        Interrupt and resume a configuration at every kind of moment, and compare to the bit.
    report              Table and report of a run, finished or not, or of several side by side.
    serve-teacher       Serve a model's likeliest tokens over HTTP, for runs that name a ServerTeacher.
    audit-loss          Say which gradient a token loss of your own follows, and which known mistake it makes.
    zoo                 List and rebuild the bundled models.
"""


def run(argv: list[str], read: Reader) -> int:
    """Run one of `COMMANDS` or `OWN_PARSER` with its arguments.

    Args:
        argv: the verb and its words.
        read: turns the words of ``opd fit`` into what they would train.
    """
    verb, words = argv[0], argv[1:]
    if verb in OWN_PARSER:
        return OWN_PARSER[verb](words, read)
    auto_cli(COMMANDS[verb], args=words, prog=f"opd {verb}", as_positional=True)
    return 0
