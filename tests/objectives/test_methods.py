"""Shipped methods that are sums of several terms, against their papers' formulas on every completion."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.cli import read
from opd_lightning.inspect.oracle import Path, TabularWorld
from opd_lightning.objectives import Constant, Objective, Terms
from tests.objectives.textbook import Book, close, world

WORLDS = {"fixed": world(4, 3, seed=6), "eos": world(4, 3, seed=8, eos=3)}
each_world = pytest.mark.parametrize("name", WORLDS)
K = 2


def shipped(name: str) -> Objective:
    """The method's own YAML; sums over tokens, and a top-k that leaves something out of a small vocabulary."""
    objective = read(["-c", f"methods/{name}.yaml"]).module.objective
    assert isinstance(objective, Terms)
    for part, _ in objective.flat():
        part.reduction = Constant(1.0)
        if hasattr(part.support, "closure"):
            part.support.k = K
    return objective


def drawn(book: Book, s: int, v: int) -> list[float]:
    """Gradient of the sampled reverse KL in the logits of a state."""
    return [-book.r(s, v) * ((u == v) - p) for u, p in enumerate(book.p[s])]


def head(book: Book, s: int) -> list[int]:
    return sorted(range(book.vocab), key=lambda v: -book.q[s][v])[:K]


def token_gradients(at: TabularWorld, of_token: object) -> torch.Tensor:
    out = torch.zeros(len(at.paths), *at.teacher.shape, dtype=torch.float64)
    path: Path
    for i, path in enumerate(at.paths):
        for s, v in zip(path.states, path.tokens, strict=True):
            out[i, s] += torch.tensor(of_token(s, v), dtype=torch.float64)
    return out


@each_world
def test_aopd(name: str) -> None:
    """Forward KL on the teacher's top-k and a tail where the drawn token is over-confident, policy gradient elsewhere."""
    at, book, seen = WORLDS[name], Book(WORLDS[name]), set()

    def of_token(s: int, v: int) -> list[float]:
        p, q, top = book.p[s], book.q[s], head(book, s)
        negative = q[v] <= p[v]
        seen.add(negative)
        if not negative:
            return drawn(book, s, v)
        tails = 1 - sum(p[u] for u in top), 1 - sum(q[u] for u in top)
        return [0.0625 * (x - (q[u] if u in top else tails[1] * x / tails[0])) for u, x in enumerate(p)]

    close(at.gradients_of(shipped("aopd")), token_gradients(at, of_token), 1e-12)
    assert seen == {True, False}


@each_world
def test_eopd(name: str) -> None:
    """Policy gradient everywhere; on top of it the teacher, renormalised on its top-k, where it is uncertain."""
    at, book, seen = WORLDS[name], Book(WORLDS[name]), set()

    def of_token(s: int, v: int) -> list[float]:
        q, top = book.q[s], head(book, s)
        uncertain = -sum(x * math.log(x) for x in q) >= 0.8
        seen.add(uncertain)
        mass = sum(q[u] for u in top)
        pull = [x - (q[u] / mass if u in top else 0.0) for u, x in enumerate(book.p[s])]
        return [x + uncertain * y for x, y in zip(drawn(book, s, v), pull, strict=True)]

    close(at.gradients_of(shipped("eopd")), token_gradients(at, of_token), 1e-12)
    assert seen == {True, False}
