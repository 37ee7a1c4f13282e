"""How much a token counts.

A `Gate` multiplies the whole contribution of a token; several gates multiply each other. What a gate looks at decides what it
does to the objective:

* ``state``: only the prefix and the two laws there. The objective stays the same sum over states, each with its weight.
* ``action``: the drawn token. The field is no longer the gradient of a weighted divergence, though it still vanishes where
  student and teacher agree.
* ``trajectory``: other tokens of the completion. The same, and a token answers for its neighbours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.shapers import positive

__all__ = [
    "Disagreement",
    "FirstTokens",
    "Gate",
    "PositionDecay",
    "PositionImportance",
    "Reliability",
    "SkipFirst",
    "SpecialTokens",
    "StudentEntropy",
    "TeacherConfidence",
    "TeacherEntropy",
    "TokenGap",
]

DependsOn = Literal["state", "action", "trajectory"]


class View(NamedTuple):
    """What gates may look at: (B, T), detached, 0 where masked.

    Attributes:
        mask: trainable positions.
        tokens: drawn tokens.
        student, teacher: log-probability of the drawn token under the student and under the target.
        student_entropy, teacher_entropy: nats.
        reverse_kl: KL(student ‖ teacher) of the state.
        advantage: of the drawn token, after shaping and credit.
        vocab: entries of the vocabulary.
    """

    mask: Tensor
    tokens: Tensor
    student: Tensor
    teacher: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    advantage: Tensor
    vocab: int

    @property
    def order(self) -> Tensor:
        """Number of the completion token, from 0."""
        return self.mask.cumsum(-1) - 1


class Gate(Configurable, ABC):
    """A factor per token, never negative and never differentiated.

    Attributes:
        depends_on: what it looks at (see the module).
        title: what `declared_target` prints.
        needs_teacher: False if it can do without the teacher's law.
        needs_law: False if it looks at the teacher's law on drawn tokens alone.
    """

    depends_on: DependsOn
    title: str
    needs_teacher: bool = True
    needs_law: bool = True

    @abstractmethod
    def weight(self, view: View) -> Float[Tensor, "B T"]:
        """The factor; any value where masked."""


class _Range(Gate):
    """1 where a value per token lies in a range, or among the completion's highest; else 0."""

    what: str

    def __init__(self, at_least: float | None = None, at_most: float | None = None, top_fraction: float = 1.0) -> None:
        name = type(self).__name__
        if not 0.0 < top_fraction <= 1.0:
            raise ValueError(f"{name}(top_fraction={top_fraction}): must lie in (0, 1]")
        if at_least is None and at_most is None and top_fraction == 1.0:
            raise ValueError(f"{name}(): give at_least, at_most or top_fraction; without any it lets everything through")
        self.at_least, self.at_most, self.top_fraction = at_least, at_most, top_fraction
        self.depends_on = "state" if top_fraction == 1.0 else "trajectory"
        low = f"{at_least:g} <= " if at_least is not None else ""
        high = f" <= {at_most:g}" if at_most is not None else ""
        self.title = f"{low}{self.what}{high}" + (f", top {top_fraction:.0%} of a completion" if top_fraction < 1.0 else "")

    @abstractmethod
    def _value(self, view: View) -> Tensor: ...

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        value = self._value(view)
        keep = view.mask.clone()
        if self.at_least is not None:
            keep &= value >= self.at_least
        if self.at_most is not None:
            keep &= value <= self.at_most
        if self.top_fraction < 1.0:
            ranked = value.masked_fill(~view.mask, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            millionths = view.mask.sum(-1, keepdim=True) * round(1e6 * self.top_fraction)
            keep &= ranked < (millionths + 999_999) // 1_000_000  # rounded up, in whole numbers: 0.6 of 25 is 15
        return keep.to(value.dtype)


class StudentEntropy(_Range):
    """Keeps tokens by the student's entropy, in nats: above or below a bound, or the highest share of every completion
    (Revisiting OPD, arXiv 2603.25562, keeps the top 20 %).

    Args:
        at_least: lower bound, or null.
        at_most: upper bound, or null.
        top_fraction: share of each completion's tokens that is kept, in (0, 1].
    """

    what = "student entropy"
    needs_teacher = False

    def _value(self, view: View) -> Tensor:
        return view.student_entropy


class TeacherEntropy(_Range):
    """Keeps tokens by the teacher's entropy, in nats (EOPD, arXiv 2603.07079, adds a forward KL above 0.8).

    Args:
        at_least: lower bound, or null.
        at_most: upper bound, or null.
        top_fraction: share of each completion's tokens that is kept, in (0, 1].
    """

    what = "teacher entropy"

    def _value(self, view: View) -> Tensor:
        return view.teacher_entropy


class Disagreement(_Range):
    """Keeps tokens by KL(student ‖ teacher) of their state, in nats.

    Args:
        at_least: lower bound, or null.
        at_most: upper bound, or null.
        top_fraction: share of each completion's tokens that is kept, in (0, 1].
    """

    what = "reverse KL of the state"

    def _value(self, view: View) -> Tensor:
        return view.reverse_kl


class TokenGap(_Range):
    """Keeps tokens by ``teacher(token) - student(token)``, a difference of probabilities in [-1, 1]: negative feedback lies
    at or below 0 (AOPD, arXiv 2605.06387).

    Args:
        at_least: lower bound, or null.
        at_most: upper bound, or null.
        top_fraction: share of each completion's tokens that is kept, in (0, 1].
    """

    what = "teacher(token) - student(token)"
    needs_law = False

    def __init__(self, at_least: float | None = None, at_most: float | None = None, top_fraction: float = 1.0) -> None:
        super().__init__(at_least, at_most, top_fraction)
        if self.depends_on == "state":
            self.depends_on = "action"

    def _value(self, view: View) -> Tensor:
        return view.teacher.exp() - view.student.exp()


class Reliability(Gate):
    """``min(teacher(token) / student(token), 1)``: tokens that the teacher hardly knows count little (TrOPD)."""

    depends_on: DependsOn = "action"
    needs_law = False
    title = "reliability min(u, 1)"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        return (view.teacher - view.student).clamp(max=0.0).exp()


class TeacherConfidence(Gate):
    """``1 - H(teacher) / log V``: states where the teacher hesitates count little (FiRe, arXiv 2606.02684)."""

    depends_on: DependsOn = "state"
    title = "teacher confidence"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        return (1.0 - view.teacher_entropy / math.log(view.vocab)).clamp(min=0.0)


class PositionImportance(Gate):
    """``1 + strength (1 - sum_{i<t} |A_i| / sum_i |A_i|)``: the weight falls as discrepancy adds up along the completion,
    from 1 + strength to 1 (IW-OPD, arXiv 2606.22600).

    Args:
        strength: at least 0.

    Raises:
        ValueError: for a negative strength.
    """

    depends_on: DependsOn = "trajectory"
    needs_law = False

    def __init__(self, strength: float = 0.5) -> None:
        if strength < 0.0:
            raise ValueError(f"PositionImportance(strength={strength}): must be at least 0")
        self.strength = strength
        self.title = f"position importance 1 to {1 + strength:g}"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        size = view.advantage.abs().where(view.mask, 0.0)
        before = size.cumsum(-1) - size
        return 1.0 + self.strength * (1.0 - before / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny))


class PositionDecay(Gate):
    """``gamma^t``, t counted from 0. With return-to-go credit discounted by the same gamma it makes the exact gradient of the
    time-discounted objective ``E sum_t gamma^t D(s_t)``.

    Args:
        gamma: in (0, 1].

    Raises:
        ValueError: for a gamma outside (0, 1].
    """

    depends_on: DependsOn = "state"
    needs_teacher = False

    def __init__(self, gamma: float) -> None:
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"PositionDecay(gamma={gamma}): must lie in (0, 1]")
        self.gamma = gamma
        self.title = f"position decay {gamma:g}^t"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        return torch.pow(self.gamma, view.order.clamp(min=0).to(view.student.dtype))


class SkipFirst(Gate):
    """Leaves out the first tokens of every completion.

    Args:
        count: tokens, at least 1.
    """

    depends_on: DependsOn = "state"
    needs_teacher = False

    def __init__(self, count: int) -> None:
        self.count = int(positive("SkipFirst", float(count)))
        self.title = f"without the first {count} tokens"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        return (view.order >= self.count).to(view.student.dtype)


class FirstTokens(Gate):
    """Keeps the first tokens of every completion only (Prefix OPD).

    Args:
        count: tokens, at least 1.
    """

    depends_on: DependsOn = "state"
    needs_teacher = False

    def __init__(self, count: int) -> None:
        self.count = int(positive("FirstTokens", float(count)))
        self.title = f"the first {count} tokens"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        return (view.order < self.count).to(view.student.dtype)


class SpecialTokens(Gate):
    """Leaves out the first occurrence of listed tokens in every completion, or all of them (Revisiting OPD).

    Args:
        ids: token ids.
        first_only: leave later occurrences in.
    """

    depends_on: DependsOn = "trajectory"
    needs_teacher = False

    def __init__(self, ids: list[int], first_only: bool = True) -> None:
        if not ids:
            raise ValueError("SpecialTokens(ids=[]): name at least one token id")
        self.ids, self.first_only = ids, first_only
        self.depends_on = "trajectory" if first_only else "action"
        self.title = f"without {'the first of ' if first_only else ''}tokens {', '.join(map(str, ids))}"

    def weight(self, view: View) -> Float[Tensor, "B T"]:
        drop = torch.zeros_like(view.mask)
        for token in self.ids:
            found = (view.tokens == token) & view.mask
            drop |= found & (found.cumsum(-1) == 1) if self.first_only else found
        return (~drop).to(view.student.dtype)
