"""How near can a student come to a teacher that knows more? The floor of privileged information, in closed form and in a toy.

A student that cannot see the information i answers with one law for all of them. The best it can do is a mean of the teacher's
laws over what could have been told, and the divergence that remains is known before training::

    forward KL   optimum  sum_i w_i q_i             floor  I(Y; I | X) = sum_i w_i KL(q_i ‖ optimum)
    reverse KL   optimum  prod_i q_i^w_i, normed    floor  -log sum_y prod_i q_i(y)^w_i

The second follows "The Many Faces of On-Policy Distillation" (arXiv 2605.11182, optimum of the reverse KL; second-hand). For
information that is the same for all rows the floor is 0 and the whole of the teacher can be learned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.objectives import ForwardKL, Objective, ReverseKL
from opd_lightning.types import Completion, Prompt, Rollout, TableLaws

Direction = Literal["reverse", "forward"]
OBJECTIVES = {"reverse": Objective(ReverseKL()), "forward": Objective(ForwardKL())}
CONTEXTS, HELD_OUT, TOKENS, TOLD = 16, 4, 12, 6
"""The toy: contexts, how many of them are never trained on, vocabulary, values of the information."""
BOOST, SPREAD = 3.0, 0.5
"""Logits that the information adds to its token, and standard deviation of all others."""
RATE, MOMENTUM = 2.0, 0.5
LEARNABLE = 0.1
"""A floor below this share of the first divergence counts as learnable: nine tenths of it can be taken over."""


def optimum(teachers: Tensor, weights: Tensor, direction: Direction) -> Tensor:
    """The best law of a student that does not see the information.

    Args:
        teachers: (X, I, V) log-probabilities under every value of the information.
        weights: (I,) how often each value is told, with sum 1.
        direction: of the KL.

    Returns:
        (X, V) log-probabilities.
    """
    shares = weights[:, None]
    if direction == "forward":
        return (teachers + shares.log()).logsumexp(1)
    return (shares * teachers).sum(1).log_softmax(-1)


def floor(teachers: Tensor, weights: Tensor, direction: Direction) -> Tensor:
    """(X,) nats that no student can go below; arguments as in `optimum`.

    >>> told = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    >>> even = torch.tensor([0.5, 0.5])
    >>> round(floor(told, even, "forward").item(), 4), round(floor(told, even, "reverse").item(), 4)
    (0.3681, 0.5108)
    """
    if direction == "reverse":
        return -(weights[:, None] * teachers).sum(1).logsumexp(-1)
    return mean_divergence(optimum(teachers, weights, direction), teachers, weights, direction)


def mean_divergence(student: Tensor, teachers: Tensor, weights: Tensor, direction: Direction) -> Tensor:
    """(X,) expected KL of one student law (X, V) and the teacher's laws (X, I, V)."""
    ours = student[:, None].expand_as(teachers)
    first, second = (ours, teachers) if direction == "reverse" else (teachers, ours)
    return ((first.exp() * (first - second)).sum(-1) * weights).sum(-1)


@dataclass(frozen=True)
class Outcome:
    """One training of the toy.

    Attributes:
        shared: the information is one rule for all rows, instead of one of six for each.
        direction, seed: of the KL and of the world.
        curve: nats a token over the trained contexts, before every step and at the end.
        floor: what no student can go below.
        behaviour: probability of the token that the information names: of the student before and after, and of the teacher.
        transfer: the student's gain in it on contexts that were never trained on, over the teacher's gain there.
    """

    shared: bool
    direction: Direction
    seed: int
    curve: tuple[float, ...]
    floor: float
    behaviour: tuple[float, float, float]
    transfer: float

    @property
    def removed(self) -> float:
        """Share of the first divergence that training has removed."""
        return 1.0 - self.curve[-1] / self.curve[0]


def train(shared: bool, direction: Direction, seed: int, steps: int) -> Outcome:
    """Distil a teacher that is told ``i`` and then prefers the token ``x + i`` into a student that is not told.

    The student has logits of its own for every context and one shared vector over ``y - x``, through which what it learns can
    reach contexts that it has never seen. Each step uses all trained contexts with all values, so the gradient is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    base = SPREAD * torch.randn(CONTEXTS, TOKENS, generator=generator, dtype=torch.float64)
    told = torch.full((TOLD,), 2) if shared else torch.arange(TOLD)
    place = (torch.arange(CONTEXTS)[:, None] + told) % TOKENS  # (X, I) the token that the information names
    teachers = (
        base[:, None].expand(-1, TOLD, -1).scatter_add(2, place[..., None], torch.full((CONTEXTS, TOLD, 1), BOOST).double())
    )
    teachers, weights = teachers.log_softmax(-1), torch.full((TOLD,), 1.0 / TOLD, dtype=torch.float64)
    own, common = base.clone().requires_grad_(), torch.zeros(TOKENS, dtype=torch.float64, requires_grad=True)
    distance = (torch.arange(TOKENS) - torch.arange(CONTEXTS)[:, None]) % TOKENS
    trained = CONTEXTS - HELD_OUT
    rows = torch.cartesian_prod(torch.arange(trained), torch.arange(TOLD))
    prompts = [Prompt(i, "", (0,), row=i) for i in range(len(rows))]
    rollout = Rollout.of(prompts, [Completion((0,), (torch.nan,), True, 0)] * len(rows), pad_id=0)  # the first law is scored
    optimizer = torch.optim.SGD([own, common], lr=RATE, momentum=MOMENTUM)

    def laws() -> Tensor:
        return (own + common[distance]).log_softmax(-1)

    def named(student: Tensor, contexts: slice) -> float:
        return float(student.detach().exp().gather(1, place)[contexts].mean())

    curve, start = [], laws().detach()
    for step in range(steps + 1):
        student = laws()
        curve.append(float(mean_divergence(student.detach(), teachers, weights, direction)[:trained].mean()))
        if step == steps:
            break
        answers = TableLaws(teachers[rows[:, 0], rows[:, 1]])
        out = OBJECTIVES[direction](TableLaws(student[rows[:, 0]]), answers, rollout)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    end, seen, unseen = laws().detach(), slice(0, trained), slice(trained, None)
    theirs = teachers.exp().gather(2, place[..., None]).squeeze(-1)
    gain = (named(end, unseen) - named(start, unseen)) / (float(theirs[unseen].mean()) - named(start, unseen))
    least = float(floor(teachers, weights, direction)[:trained].mean())
    behaviour = (named(start, seen), named(end, seen), float(theirs[seen].mean()))
    return Outcome(shared, direction, seed, tuple(curve), least, behaviour, gain)


def run(folder: Path, seeds: Sequence[int], steps: int) -> list[Outcome]:
    """Every kind of information and direction with every seed; writes ``floor.json`` and ``floor.png`` into the folder."""
    directions: tuple[Direction, Direction] = ("reverse", "forward")
    found = [train(shared, way, seed, steps) for shared in (True, False) for way in directions for seed in seeds]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "floor.json").write_text(json.dumps([asdict(o) | {"removed": o.removed} for o in found]), encoding="utf-8")
    _draw(folder / "floor.png", found)
    return found


def table(found: Sequence[Outcome]) -> str:
    """Means over seeds, and what they say about each kind of information.

    ``off floor`` is the largest relative distance of a trained student from the closed form; left out for a floor of 0.
    """
    lines = [
        f"{'information':<12}{'KL':<9}{'start':>8}{'end':>8}{'floor':>8}{'removed':>9}{'off floor':>11}"
        f"{'P(named)':>20}{'teacher':>9}{'transfer':>10}"
    ]
    for shared, way in dict.fromkeys((o.shared, o.direction) for o in found):
        group = [o for o in found if (o.shared, o.direction) == (shared, way)]

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        start, end, least = (
            mean([v(o) for o in group]) for v in (lambda o: o.curve[0], lambda o: o.curve[-1], lambda o: o.floor)
        )
        off = max(abs(o.curve[-1] / o.floor - 1.0) for o in group) if least > 1e-9 else None
        before, after, teacher = (mean([o.behaviour[i] for o in group]) for i in range(3))
        lines.append(
            f"{'shared' if shared else 'instance':<12}{way:<9}{start:8.4f}{end:8.4f}{max(least, 0.0):8.4f}"
            f"{mean([o.removed for o in group]):9.1%}{'-' if off is None else f'{off:.2%}':>11}"
            f"{f'{before:.3f} -> {after:.3f}':>20}{teacher:9.3f}{mean([o.transfer for o in group]):10.1%}"
        )
    for shared, name in ((True, "shared rule"), (False, "instance answers")):
        group = [o for o in found if o.shared is shared and o.direction == "reverse"]
        if group:
            least, start = (sum(v) / len(group) for v in ([o.floor for o in group], [o.curve[0] for o in group]))
            verdict = "learnable" if least < LEARNABLE * start else "not learnable"
            lines.append(f"{name}: floor {max(least, 0.0):.2f} nat of {start:.2f}, {verdict}")
    return "\n".join(lines)


def _draw(file: Path, found: Sequence[Outcome]) -> None:
    """One panel a kind of information: every seed's curve, and its floor as a dashed line."""
    from matplotlib import pyplot as plt

    from opd_lightning.inspect.figures import STYLE  # and a backend that needs no display

    with plt.rc_context({**STYLE, "font.size": 10}):
        figure, axes = plt.subplots(1, 2, figsize=(10.0, 3.8), sharey=True, layout="constrained")
        titles = ("one rule for all rows: the floor is 0", "another answer for every row")
        for place, shared, title in zip(axes, (True, False), titles, strict=True):
            for outcome in (o for o in found if o.shared is shared):
                color = "C0" if outcome.direction == "reverse" else "C1"
                first = outcome.seed == found[0].seed
                place.plot(outcome.curve, color=color, lw=1.2, label=f"{outcome.direction} KL" if first else None)
                label = f"its floor, {max(outcome.floor, 0.0):.3f}" if first else None
                place.axhline(max(outcome.floor, 0.0), color=color, ls="--", lw=0.8, label=label)
            place.set_title(title, loc="left", fontsize=10)
            place.set_xlabel("optimizer steps")
            place.set_ylim(bottom=-0.03)
            place.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("divergence from the teacher (nats/token)")
        figure.savefig(file, dpi=160)
        plt.close(figure)
