"""An audit on the command line: finding the loss, and saying what was found."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from opd_lightning.inspect.audit import Audit
from opd_lightning.inspect.fields import TITLES
from opd_lightning.inspect.probes import CONTRACT, ONLY, TokenLoss, UnusableLoss

WIDTH = 100
ESTIMATORS = {
    "loss": "this loss",
    "sampled_token": "sampled token, reverse KL",
    "sampled_token_with_baseline": "  with the closed-form baseline",
    "full_vocabulary": "full vocabulary, reverse KL",
}


def load_loss(spec: str) -> TokenLoss:
    """The function behind ``path/to/file.py:function``.

    Raises:
        FileNotFoundError: if there is no such file.
        UnusableLoss: if the file fails, or has no such function, or the function takes other arguments.
    """
    path, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"audit-loss {spec}: there is no file {path!r}. Write path/to/loss.py:function")
    module = _imported(file)
    known = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
    loss: Any = getattr(module, name, None) if name else None
    if not callable(loss):
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f" Did you mean {file}:{near[0]}?" if near else ""
        raise UnusableLoss(
            f"{file} has no function {name!r}.{hint}\n  Functions there: {', '.join(known) or 'none'}\n  Write {file}:function"
            if name
            else f"audit-loss {spec}: which function?\n  Functions there: {', '.join(known) or 'none'}\n  Write {file}:function"
        )
    try:
        inspect.signature(loss).bind(*[None] * 4)
    except TypeError as error:
        raise UnusableLoss(
            f"{name}{inspect.signature(loss)} cannot be called with four arguments ({error})\n  Allowed: {CONTRACT}\n"
            "  Take exactly these four, in this order; further arguments need defaults"
        ) from error
    found: TokenLoss = loss
    return found


def _imported(file: Path) -> Any:
    name = f"audited_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UnusableLoss(f"{file} is no Python file: write path/to/loss.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    sys.path.insert(0, str(file.resolve().parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UnusableLoss(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def table(found: Audit, name: str) -> str:
    """What was found, for a terminal: a table and the verdict."""
    lines = [f"{name}: the gradient on all {found.completions} completions of a small world, enumerated", ""]
    for title, text in _rows(found):
        lines += _row(title, text)
    lines += ["", "  sampling noise: variance over the squared expected gradient; a batch of n completions divides it by n"]
    for key, noise in found.variance.items():
        shown = "only noise" if noise.relative is None else f"{noise.relative:.4g}"
        lines.append(f"    {ESTIMATORS[key]:<34}{shown:>12}")
    return "\n".join([*lines, "", *_verdict(found)])


def _row(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {title:<26}", subsequent_indent=" " * 28)


def _rows(found: Audit) -> list[tuple[str, str]]:
    how = ""
    if found.scale is not None and found.residual is not None:
        sign = "" if found.scale > 0 else "ASCENDS "
        how = f" ({sign}up to a factor of {abs(found.scale):.4g}; left over: {found.residual:.1e})"
    cosines = ", ".join(f"{TITLES[name]} {value:+.4f}" for name, value in found.cosines.items())
    teacher = "yes" if found.teacher_in_gradient else "NO: another teacher gives the same gradient"
    if found.teacher_in_gradient and not found.teacher_in_expectation:
        teacher = "ONLY AS NOISE: another teacher gives the same expected gradient"
    padding = "does not leak"
    if found.padding.leaks:
        how_it_leaks = {
            "the content of masked positions moves it": found.padding.content,
            "masked columns are counted in the mean": found.padding.counted,
            "appending masked columns moves it": found.padding.columns and not found.padding.counted,
        }
        padding = "LEAKS: " + "; ".join(text for text, true in how_it_leaks.items() if true)
    broken = [f"{ONLY[who]}: {what}" for who, what in found.infinity.items() if what != "ok"]
    return [
        ("expected gradient of", found.follows + how),
        ("cosine with that of", cosines),
        ("teacher in the gradient", teacher),
        ("padding", padding),
        ("-inf in student, teacher", f"BREAKS ({'; '.join(broken)})" if broken else "safe, alone and in both"),
        ("adds up as", found.reduction),
    ]


def _verdict(found: Audit) -> list[str]:
    if found.sound:
        what = "a gradient that is none of the known ones" if found.scale is None else found.follows
        lines = [f"verdict: no defect found; it descends {what}"]
        return lines + [
            line for one in found.defects for line in textwrap.wrap(f"    but: {one}", WIDTH, subsequent_indent="         ")
        ]
    lines = []
    for i, one in enumerate(found.defects):
        start = "verdict: DEFECT: " if i == 0 else "    and: "
        lines += textwrap.wrap(f"{start}{one}", WIDTH, subsequent_indent="         ")
    return lines
