"""Loops over completions in probability space, to compare the package with. Nothing here calls an objective."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from opd_lightning.inspect.oracle import Path, TabularWorld

Advantages = Callable[[Path], list[float]]


def worlds() -> dict[str, TabularWorld]:
    """A fixed length, and completions that end early; both with a third law that may write."""
    return {"fixed": world(vocab=3, horizon=3, seed=5), "eos": world(vocab=3, horizon=3, seed=1, eos=2)}


def world(vocab: int, horizon: int, seed: int, eos: int | None = None) -> TabularWorld:
    count = sum((vocab if eos is None else vocab - 1) ** depth for depth in range(horizon))
    tables = torch.randn(3, count, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    student, teacher = 1.2 * tables[0], 1.2 * tables[1]
    return TabularWorld(student, teacher, horizon, eos, sampler=student + 0.5 * tables[2])


def golden() -> TabularWorld:
    student = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    teacher = torch.tensor([[0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.4, 0.4, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)
    return TabularWorld.from_probabilities(student, teacher, horizon=2)


class Book:
    """The laws of a world as nested lists of probabilities, and textbook quantities of them."""

    def __init__(self, of: TabularWorld) -> None:
        self.world = of
        tables = (of.student.detach(), of.teacher, of.sampler)
        self.p, self.q, self.mu = ([[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in t.tolist()] for t in tables)
        self.vocab, self.number = of.vocab, {prefix: i for i, prefix in enumerate(of.states)}

    def r(self, s: int, v: int) -> float:
        """log q / p"""
        return math.log(self.q[s][v] / self.p[s][v])

    def kl(self, s: int) -> float:
        return -sum(p * self.r(s, v) for v, p in enumerate(self.p[s]))

    def rewards(self, path: Path) -> list[float]:
        return [self.r(s, v) for s, v in zip(path.states, path.tokens, strict=True)]

    def kls(self, path: Path) -> list[float]:
        return [self.kl(s) for s in path.states]

    def ratios(self, path: Path) -> list[float]:
        return [self.p[s][v] / self.mu[s][v] for s, v in zip(path.states, path.tokens, strict=True)]

    def value(self, cost: Callable[[int], float], gamma: float, prefix: tuple[int, ...] = ()) -> float:
        """Expected discounted cost from a prefix on."""
        if prefix not in self.number:
            return 0.0
        s = self.number[prefix]
        return cost(s) + gamma * sum(p * self.value(cost, gamma, (*prefix, v)) for v, p in enumerate(self.p[s]))

    def values(self, cost: Callable[[int], float], gamma: float) -> list[float]:
        return [self.value(cost, gamma, prefix) for prefix in self.world.states]

    def scores(self, weights: Advantages) -> torch.Tensor:
        """(paths, S, V): gradient of ``- sum_t w_t log p(y_t)`` on every completion, ``e_y - p`` by hand."""
        out = torch.zeros(len(self.world.paths), len(self.p), self.vocab, dtype=torch.float64)
        for i, path in enumerate(self.world.paths):
            for s, v, w in zip(path.states, path.tokens, weights(path), strict=True):
                for u in range(self.vocab):
                    out[i, s, u] -= w * ((u == v) - self.p[s][u])
        return out

    def mean(self, per_path: torch.Tensor, writer: str = "student") -> torch.Tensor:
        return sum(path.probability(writer) * g for path, g in zip(self.world.paths, per_path, strict=True))

    def trace(self, per_path: torch.Tensor, writer: str = "student") -> float:
        second = sum(
            path.probability(writer) * float((g * g).sum()) for path, g in zip(self.world.paths, per_path, strict=True)
        )
        return second - float(self.mean(per_path, writer).square().sum())

    def gradient_of_sum(self, cost: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], gamma: float) -> torch.Tensor:
        """Gradient of ``E sum_t gamma^t cost(p_t, q_t)``, the completions' probabilities differentiated too."""
        law, total = self.world.student.softmax(-1), torch.zeros((), dtype=torch.float64)
        for path in self.world.paths:
            chance = torch.ones((), dtype=torch.float64)
            for t, (s, v) in enumerate(zip(path.states, path.tokens, strict=True)):
                # a state's cost is shared out over the completions through it: each pays with its own probability
                total = total + gamma**t * self._rest(path, t, law) * chance * cost(
                    law[s], torch.tensor(self.q[s], dtype=torch.float64)
                )
                chance = chance * law[s, v]
        return torch.autograd.grad(total, self.world.student)[0]

    def _rest(self, path: Path, t: int, law: torch.Tensor) -> torch.Tensor:
        out = torch.ones((), dtype=torch.float64)
        for s, v in zip(path.states[t:], path.tokens[t:], strict=True):
            out = out * law[s, v]
        return out


def reverse_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-10) -> None:
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=atol, rtol=0.0)
