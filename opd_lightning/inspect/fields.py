"""Which known gradient a measured one is.

The expected gradient of a loss over the student's own completions is a field: one vector per prefix. Here it is compared
with fields that are computed exactly: divergences state by state, the reverse KL with every convention of discounting, the
entropy, truncated supports. A field is recognised only if nothing but rounding is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.inspect.oracle import StateDivergence, TabularWorld, forward_kl, reverse_kl
from opd_lightning.objectives import Divergence, ForwardKL, GeneralizedJSD, Objective, ReverseKL, TopK


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the sum of the absolute differences of every row."""
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


def negative_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the student's entropy at every row: descending it makes the student more random."""
    return (student.exp() * student).sum(-1)


LOCAL: dict[str, StateDivergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "total_variation": total_variation,
}
TITLES = {
    "reverse_kl": "token-level reverse KL",
    "forward_kl": "token-level forward KL",
    "total_variation": "total variation",
    "sequence_reverse_kl": "sequence-level reverse KL",
    "nothing": "nothing",
    "other": "none of these",
}


@dataclass(frozen=True)
class Fit:
    """A field written as a sum of known ones.

    Attributes:
        coefficients: factor of each.
        residual: what is left, relative to the field.
    """

    coefficients: tuple[float, ...]
    residual: float

    def share(self, i: int) -> float:
        """A coefficient relative to the first."""
        return self.coefficients[i] / self.coefficients[0]


def fit(field: Tensor, *basis: Tensor) -> Fit:
    """Least squares."""
    matrix = torch.stack([b.flatten() for b in basis], 1)
    solution = torch.linalg.lstsq(matrix, field.flatten()[:, None], driver="gelsd").solution
    rest = (matrix @ solution).flatten() - field.flatten()
    return Fit(tuple(solution.flatten().tolist()), float(rest.norm() / field.norm()))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two fields; 0 if one of them vanishes."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


@dataclass(frozen=True)
class Match:
    """What a field was recognised as.

    Attributes:
        title: in words.
        scale: the factor in front of it.
        residual: what is left, relative to the field.
        defect: a key of `opd_lightning.inspect.defects.DEFECTS`, if the field has one.
    """

    title: str
    scale: float
    residual: float
    defect: str | None = None


class Fields:
    """The known fields of one world."""

    def __init__(self, world: TabularWorld) -> None:
        self.world = world
        self.local = {name: world.gradient(divergence, 0.0) for name, divergence in LOCAL.items()}
        self.entropy = world.gradient(negative_entropy, 0.0)
        self.sequence = world.gradient(reverse_kl, 1.0)
        self.lags = self._lags()

    def _lags(self) -> list[Tensor]:
        """The reverse KL's gradient by how many steps later a cost falls due: ``sum_k gamma^k lags[k]`` for every gamma.

        Three values of a polynomial of degree two give its coefficients.
        """
        none, half, full = self.local["reverse_kl"], self.world.gradient(reverse_kl, 0.5), self.sequence
        one = 4 * half - 3 * none - full
        return [none, one, full - none - one]

    def _at(self, step: int, field: Tensor) -> Tensor:
        """The part of a field that moves the tokens of one step."""
        here = torch.tensor([len(prefix) == step for prefix in self.world.states])
        return torch.where(here[:, None], field, torch.zeros_like(field))

    def cosines(self, field: Tensor) -> dict[str, float]:
        return {name: cosine(field, known) for name, known in {**self.local, "sequence_reverse_kl": self.sequence}.items()}

    def recognise(self, field: Tensor, tolerance: float) -> Match | None:
        """The first known field that leaves no residual."""
        for candidate in self._candidates(field, tolerance):
            if candidate.residual < tolerance:
                return candidate
        return None

    def _candidates(self, field: Tensor, tolerance: float) -> Iterator[Match]:
        for name, known in self.local.items():
            yield _single(field, known, TITLES[name])
        yield _single(field, self.entropy, "the student's entropy alone", "detached_weight")
        yield from self._credits(field, 10 * tolerance)
        yield from self._mixtures(field)
        yield from self._truncated(field)

    def _credits(self, field: Tensor, tolerance: float) -> Iterator[Match]:
        """The reverse KL with credit for later costs, with an entropy term or without."""
        steps = range(3)
        zero = torch.zeros_like(field)
        by_time = [sum((self._at(i - k, self.lags[k]) for k in range(i + 1)), zero) for i in steps]
        by_token = [sum((self._at(t, self.lags[k]) for k in steps), zero) for t in steps]
        local = [self._at(t, self.lags[0]) for t in steps]
        for style, basis in (("lag", self.lags), ("time", by_time), ("token", by_token), ("local", local)):
            found = fit(field, *basis, self.entropy)
            if found.residual < tolerance and (match := _credit(style, found, tolerance)):
                yield match

    def _mixtures(self, field: Tensor) -> Iterator[Match]:
        both = fit(field, self.local["reverse_kl"], self.local["forward_kl"])
        reverse, forward = both.coefficients
        if reverse > 0 and forward > 0:
            yield Match(f"reverse KL + {forward / reverse:.4g} x forward KL", reverse, both.residual)
        elif reverse > 0:
            title = f"reverse KL - {-forward / reverse:.4g} x forward KL"
            yield Match(title, reverse, both.residual, "k3_as_advantage")
        for tenth in range(1, 10):
            jsd = Objective(GeneralizedJSD(tenth / 10))
            yield _single(field, self.world.declared_gradient(jsd), f"token-level JSD (beta={tenth / 10:g})")

    def _truncated(self, field: Tensor) -> Iterator[Match]:
        """Top-k supports, by every chooser and closure, and the student's mass on them."""
        divergences: list[Divergence] = [ReverseKL(), ForwardKL()]
        for k in range(1, self.world.vocab):
            for by in ("student", "teacher"):
                for log, word in ((False, "mass"), (True, "log-mass")):
                    title = f"the student's {word} on the top-{k} by {by}"
                    found = _single(field, self._mass(k, by, log), title, "detached_weight")
                    # the other way round it is a likelihood: the student imitates hard labels
                    yield found if found.scale > 0 else Match(f"minus {title}", -found.scale, found.residual)
                for closure in ("raw", "tail", "renormalize", "stop_gradient"):
                    for divergence in divergences:
                        support: Any = TopK(k, by, closure)  # type: ignore[arg-type]
                        objective = Objective(divergence, support, allow_degenerate=True)
                        title = f"{divergence.title}, {support.title}"
                        defect = "raw_top_k" if closure == "raw" else None
                        yield _single(field, self.world.declared_gradient(objective), title, defect)

    def _mass(self, k: int, by: str, log: bool = False) -> Tensor:
        def mass(student: Tensor, teacher: Tensor) -> Tensor:
            ids = (student.detach() if by == "student" else teacher).topk(k, -1).indices
            found = student.gather(-1, ids).logsumexp(-1)
            return found if log else found.exp()

        return self.world.gradient(mass, 0.0)

    def mass(self, field: Tensor, tolerance: float) -> Match | None:
        """Which top-k's mass a field moves, for a world where student and teacher agree."""
        for k in range(1, self.world.vocab):
            if (match := _single(field, self._mass(k, "student"), f"top-{k}")).residual < tolerance:
                return match
        return None


def _single(field: Tensor, known: Tensor, title: str, defect: str | None = None) -> Match:
    if not bool(known.any()):
        return Match(title, 0.0, 1.0)
    found = fit(field, known)
    return Match(title, found.coefficients[0], found.residual, defect)


def _credit(style: str, found: Fit, tolerance: float) -> Match | None:
    """Name the coefficients of a `Fields._credits` family, or None if they are not powers of one gamma."""
    scale, (now, later, last, noise) = found.coefficients[0], found.coefficients

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(now), abs(later), abs(noise))

    if near(now, 0.0):
        missing = style == "lag" and not near(later, 0.0)
        return Match("how tokens move later states, alone", later, found.residual, "local_term_missing") if missing else None
    gamma, entropy = found.share(1), found.share(3)
    if not near(last, gamma**2 * now):
        return None
    if style == "lag":
        title = {0.0: TITLES["reverse_kl"], 1.0: TITLES["sequence_reverse_kl"]}.get(
            round(gamma, 5), f"discounted reverse KL (gamma={gamma:.4g})"
        )
        defect = None
    else:
        where = {"time": "cost i", "token": "all credit of token t", "local": "the cost of token t"}[style]
        power = "i" if style == "time" else "t"
        title, defect = f"reverse KL with {where} weighted by gamma^{power} (gamma={gamma:.4g})", "gamma_t"
    if not near(noise, 0.0):
        title += f" {'-' if entropy > 0 else '+'} {abs(entropy):.4g} x entropy"
        defect = defect or ("undetached_advantage" if near(noise, now) else "entropy_term")
    return Match(title, scale, found.residual, defect)
