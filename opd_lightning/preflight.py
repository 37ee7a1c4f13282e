"""Verbs of ``opd`` that look at a pair of models before a run."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_lightning.inspect.setups import Setup

Reader = Callable[[list[str]], Setup]
"""Turns the words of ``opd fit`` into what they would train."""

DOCTOR = """Examines a run before it starts: 16 of its prompts, a few completions of both models, no training. It shows what the
two share (vocabulary, end tokens, templates, thinking mode), what a step will take, and on the student's own text entropy,
overlap and its mass, reverse KL by position, the teacher's likelihood, the share of states where the teacher would write
something else, and what is gained when the teacher goes on from a cut text of the student. The verdict is `go`, `cold-start
first (about N steps)`, `choose other prompts` or `refuse`, with reasons that name the key to change."""
DOCTOR_ENDING = """
examples:
  opd doctor -c quickstart.yaml
  opd doctor -c quickstart.yaml --json runs/quickstart/doctor.json     # the report of that run shows it
  opd doctor --cost -c quickstart.yaml --data.batch_size 128           # time and memory, beside three measured steps
All other keys of `opd fit` are understood too.
exit code: 0 go, 1 any other verdict, 2 the configuration cannot be used
"""


def verb(name: str, about: str, ending: str = "", config: bool = True) -> argparse.ArgumentParser:
    """A parser of ``opd NAME``; with `config` it takes configurations, as ``opd fit`` does."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"opd {name}", description=about, epilog=ending, formatter_class=layout, allow_abbrev=False
    )
    if config:
        parser.add_argument("-c", "--config", action="append", default=[], help="a file or a shipped name; repeatable")
    return parser


def understood(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a verb was given, and the words that are meant for ``opd fit``: its configurations and everything unknown."""
    given, flags = parser.parse_known_args(words)
    return given, [*(word for name in given.config for word in ("-c", name)), *flags]


def _examiner(name: str, about: str, ending: str) -> argparse.ArgumentParser:
    """A parser with the flags of an examination."""
    from docstring_parser import parse

    from opd_lightning.inspect.verdict import Thresholds

    parser = verb(name, about, ending)
    add = parser.add_argument
    add("--prompts", type=int, default=16, help="training prompts to look at (default: %(default)s)")
    add("--samples", type=int, default=4, help="completions of each (default: %(default)s)")
    add("--k", type=int, default=0, help="size of the top-k sets (default: 16, or a fifth of a small vocabulary)")
    group = parser.add_argument_group("thresholds")
    for about_one in parse(Thresholds.__doc__ or "").params:
        key, text = about_one.arg_name, (about_one.description or "").replace("\n", " ").replace("%", "%%")
        default = getattr(Thresholds, key)
        group.add_argument(f"--{key}", type=float, default=default, help=f"{text} (default: {default:g})")
    return parser


def _thresholds(given: argparse.Namespace) -> Any:
    from opd_lightning.inspect.verdict import Thresholds

    return Thresholds(**{name: getattr(given, name) for name in Thresholds.__dataclass_fields__})


def doctor(words: list[str], read: Reader) -> int:
    """``opd doctor``."""
    parser = _examiner("doctor", DOCTOR, DOCTOR_ENDING)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    parser.add_argument("--cost", action="store_true", help="only time and memory of a step: forecast and measurement")
    parser.add_argument("--no-measure", action="store_true", help="with --cost: do not run three steps beside the forecast")
    given, flags = understood(parser, words)
    setup = read(flags)
    if given.cost:
        from opd_lightning.inspect.cost import cost

        print(cost(setup, flags, not given.no_measure))
        return 0
    from opd_lightning.inspect import doctor as examination

    found = examination.examine(setup, given.prompts, given.samples, given.k, _thresholds(given))
    print(examination.page(found))
    if given.json:
        examination.save(found, given.json)
        print(f"\nwrote {given.json}")
    return 0 if found.verdict.word == "go" else 1


PICK = """Ranks teachers for one student: each is examined as `opd doctor` does, all on the same completions of the student.
First comes the verdict, then how much the student's own text gains when the teacher goes on from it, then the probability that
the student gives to tokens which both prefer. A teacher's own score is shown, but ranks nothing."""
PICK_ENDING = """
example: opd pick-teacher -c quickstart.yaml --teachers zoo/addition/teacher runs/other/checkpoints/step-000100.ckpt
A teacher is a hub name, a folder (a model or an adapter), a GGUF file, a zoo model or a checkpoint of an earlier run.
All other keys of `opd fit` are understood too; the configuration's own teacher is not loaded.
exit code: 0 the best one is a `go`, 1 none is, 2 the configuration or a name cannot be used
"""


def pick_teacher(words: list[str], read: Reader) -> int:
    """``opd pick-teacher``."""
    parser = _examiner("pick-teacher", PICK, PICK_ENDING)
    parser.add_argument("--teachers", nargs="+", required=True, metavar="TEACHER", help="the candidates")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well, best first")
    given, flags = understood(parser, words)
    from opd_lightning.inspect import choice

    found = choice.pick(read(flags), given.teachers, given.prompts, given.samples, given.k, _thresholds(given))
    print(choice.table(found))
    if given.json:
        plain = [{"teacher": c.name, **c.diagnosis.to_dict()} for c in found]
        given.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {given.json}")
    return 0 if found[0].diagnosis.verdict.word == "go" else 1


PAIR = """Shows what student and teacher read for the same row, in two columns, as their templates render it: + is what only the
teacher reads, | lines that differ. Lines with ! name what differs beside the information: where the completion begins, thinking
mode, chat templates, tokens that end a text. No weights are loaded."""


def inspect_pair(words: list[str], read: Reader) -> int:
    """``opd inspect-pair``."""
    ending = "example: opd inspect-pair -c experiments/smollm2_system_prompt.yaml\nother keys of `opd fit` are understood"
    parser = verb("inspect-pair", PAIR, ending)
    parser.add_argument("--rows", type=int, default=1, help="rows of the training set (default: %(default)s)")
    parser.add_argument("--width", type=int, help="characters of a line (default: the terminal's)")
    given, flags = understood(parser, words)
    from opd_lightning.inspect.pairs import show as show_pair

    print(show_pair(read(flags), given.rows, given.width or shutil.get_terminal_size((120, 24)).columns))
    return 0
