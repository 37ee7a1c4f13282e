"""Verbs of ``opd`` that train nothing: configurations, reports, the zoo, audits of losses and of objectives."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from opd_lightning import configfiles
from opd_lightning.inspect.setups import Setup, side_by_side
from opd_lightning.zoo.build import build, show

Reader = Callable[[list[str]], Setup]


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
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("opd audit-loss", description=AUDIT_HELP, epilog=AUDIT_EXIT, formatter_class=layout)
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
    parser = argparse.ArgumentParser(
        "opd diff", description=about, epilog="example: opd diff methods/opd.yaml methods/gkd.yaml"
    )
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
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("opd validate-config", description=about, epilog=more, formatter_class=layout)
    parser.add_argument("-c", "--config", action="append", help="a file or a shipped name; several are laid over each other")
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return 0
    print("\n".join(read(words).declared()))
    return 0


COMMANDS: dict[str, Any] = {"configs": configs, "report": report, "zoo": {"build": build, "list": show}}
"""Verbs whose arguments are read from the signature."""
OWN_PARSER: dict[str, Callable[[list[str], Reader], int]] = {
    "audit-loss": audit_loss,
    "diff": diff,
    "validate-config": validate_config,
}
"""Verbs that read their own words and return the exit code."""


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
