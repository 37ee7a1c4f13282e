"""Pass criteria: comparisons of figures, written as a person would, judged over seeds."""

from __future__ import annotations

import ast
import math
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Mapping[str, float]]
"""Arm -> figure -> number, of one seed or on average."""

OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
COMPARISONS: dict[type[ast.AST], tuple[Callable[[float, float], bool], str]] = {
    ast.GtE: (operator.ge, "≥"),
    ast.LtE: (operator.le, "≤"),
    ast.Gt: (operator.gt, ">"),
    ast.Lt: (operator.lt, "<"),
}
FUNCTIONS: dict[str, Callable[..., float]] = {"abs": abs, "min": min, "max": max}
SHARE = re.compile(r"^(?:(every seed)|(\d+)% of seeds): (.+)$")


def value(node: ast.expr, figures: Figures) -> float:
    """An arithmetic expression of figures, ``arm.figure``.

    Raises:
        ValueError: for a figure that was not measured, naming those that were, or for anything but arithmetic.
    """
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Attribute(value=ast.Name(id=arm), attr=figure):
            if arm not in figures:
                raise ValueError(f"{arm}.{figure}: there is no arm {arm!r}; arms are {', '.join(figures)}")
            if figure not in figures[arm]:
                raise ValueError(f"{arm}.{figure} was not measured; {arm} has {', '.join(figures[arm])}")
            return figures[arm][figure]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return float(OPERATIONS[type(op)](value(left, figures), value(right, figures)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand, figures)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return float(FUNCTIONS[name](*(value(a, figures) for a in arguments)))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic of figures (arm.figure), numbers, abs, min and max")


@dataclass(frozen=True)
class Criterion:
    """One comparison.

    Attributes:
        text: as it was written: ``a.x >= 0.8``, or with ``every seed: `` or ``80% of seeds: `` in front, which judges the
            seeds one by one instead of the means.
        left, right: its two sides.
        compare: the comparison.
        share: of the seeds for which it must hold; None judges means.
    """

    text: str
    left: ast.expr
    right: ast.expr
    compare: type[ast.AST]
    share: float | None

    @classmethod
    def of(cls, text: str) -> Criterion:
        """Read one.

        Raises:
            ValueError: for anything but one comparison.

        >>> Criterion.of("a.x - b.x >= 0.2").judge([{"a": {"x": 0.5}, "b": {"x": 0.2}}]).holds
        True
        """
        found = SHARE.match(text)
        share = None if found is None else 1.0 if found[1] else int(found[2]) / 100
        try:
            tree = ast.parse(text if found is None else found[3], mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"criterion {text!r} cannot be read: {error.msg}") from error
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in COMPARISONS:
            raise ValueError(f"criterion {text!r} must be one comparison with >=, <=, > or <")
        return cls(text, tree.left, tree.comparators[0], type(tree.ops[0]), share)

    @property
    def arms(self) -> set[str]:
        """The arms that it speaks of."""
        sides = (*ast.walk(self.left), *ast.walk(self.right))
        return {n.value.id for n in sides if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}

    def judge(self, seeds: Sequence[Figures]) -> Judgement:
        """Whether it holds, with what was measured."""
        holds, sign = COMPARISONS[self.compare]
        each = [(value(self.left, f), value(self.right, f)) for f in seeds]
        left, right = (statistics.fmean(side) for side in zip(*each, strict=True))
        deviation = statistics.stdev([a for a, _ in each]) if len(each) > 1 else None
        if self.share is None:
            mean = means(seeds)
            left, right = value(self.left, mean), value(self.right, mean)
            fulfilled = holds(left, right)
            note = ""
        else:
            count = sum(holds(a, b) for a, b in each)
            fulfilled = count >= self.share * len(each)
            note = f"{count} of {len(each)} seeds"
        fixed = not any(isinstance(n, ast.Attribute) for n in ast.walk(self.right))
        wanted = f"{sign} {ast.unparse(self.right)}" + ("" if fixed else f" = {number(right)}")
        return Judgement(self.text, fulfilled, left, deviation, wanted, note)


@dataclass(frozen=True)
class Judgement:
    """A criterion with its figures.

    Attributes:
        text: the criterion.
        holds: whether it does.
        left: the left side, of the means (or the mean of the seeds' own).
        deviation: standard deviation of the left side over seeds; None for one seed.
        wanted: comparison and right side.
        note: of how many seeds it holds, where that is asked.
    """

    text: str
    holds: bool
    left: float
    deviation: float | None
    wanted: str
    note: str = ""

    def measured(self) -> str:
        """``0.981 ± 0.004, 3 of 3 seeds``."""
        spread = f" ± {number(self.deviation)}" if self.deviation is not None else ""
        return f"{number(self.left)}{spread}" + (f", {self.note}" if self.note else "")


def means(seeds: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Every figure averaged over the seeds."""
    return {arm: {name: statistics.fmean(s[arm][name] for s in seeds) for name in found} for arm, found in seeds[0].items()}


def number(x: float) -> str:
    """Three significant digits, without an exponent where a person would write none.

    >>> number(0.98123), number(12.0), number(3e-16), number(0.0)
    ('0.981', '12', '3e-16', '0')
    """
    if x == 0.0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:.3g}" if 1e-3 <= abs(x) < 1e4 else f"{x:.2g}"
