"""The divergences as papers print them, from probabilities: what the oracle holds the package against.

Nothing here calls the log-space code of `opd_lightning.objectives`. Every entry is written so that it is 0, with zero
gradient, where student p and teacher q agree; on two laws of mass 1 the terms ``- a + b`` add up to nothing. Gradients are
those of autograd; ``detach`` marks what a paper holds fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_lightning.objectives import (
    AdaptiveKL,
    Amari,
    Divergence,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    Hellinger,
    Jeffreys,
    NeymanChi2,
    Objective,
    PearsonChi2,
    Renyi,
    ReverseKL,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TopK,
    TotalVariation,
    WrittenToken,
)

Comparison = Callable[[Any, Tensor, Tensor], Tensor]
"""(divergence, student p, teacher q) -> one number per entry, or per law."""

NOTHING = 1e-300
"""Stands for a probability of 0 in both laws."""


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return a * (a / b).log() - a + b


def _jsd(d: GeneralizedJSD, p: Tensor, q: Tensor) -> Tensor:
    m = d.beta * q + (1 - d.beta) * p
    value = d.beta * _kl(q, m) + (1 - d.beta) * _kl(p, m)
    return value / (d.beta * (1 - d.beta)) if d.normalize == "curvature" else value


def _skew_forward(d: SkewForwardKL, p: Tensor, q: Tensor) -> Tensor:
    value = _kl(q, d.alpha * q + (1 - d.alpha) * p)
    return value / (1 - d.alpha) ** 2 if d.normalize == "curvature" else value


def _skew_reverse(d: SkewReverseKL, p: Tensor, q: Tensor) -> Tensor:
    m = d.alpha * p + (1 - d.alpha) * q
    value = _kl(p, m.detach() if d.frozen else m)
    return value / (1 - d.alpha) ** (1 if d.frozen else 2) if d.normalize == "curvature" else value


def _amari(d: Amari, p: Tensor, q: Tensor) -> Tensor:
    return (q**d.alpha * p ** (1 - d.alpha) - d.alpha * q - (1 - d.alpha) * p) / (d.alpha * (d.alpha - 1))


def _todi(d: ToDi, p: Tensor, q: Tensor) -> Tensor:
    a = (q / (p + q)).detach()
    return a * q * (q / p).log() + (1 - a) * p * (p / q).log()


def _renyi(d: Renyi, p: Tensor, q: Tensor) -> Tensor:
    value = (q**d.alpha * p ** (1 - d.alpha)).sum(-1).log() / (d.alpha - 1)
    return value / d.alpha if d.normalize == "curvature" else value


def _adaptive(d: AdaptiveKL, p: Tensor, q: Tensor) -> Tensor:
    at_least_as_likely = q[..., None, :] >= q[..., :, None]
    head = (at_least_as_likely * q[..., None, :]).sum(-1) <= d.mu
    head = head | (q == q.max(-1, keepdim=True).values)
    gap = (p - q).abs().detach()
    h = (gap * head).sum(-1) / gap.sum(-1).clamp(min=NOTHING)
    return h * _kl(q, p).sum(-1) + (1 - h) * _kl(p, q).sum(-1)


ENTRIES: dict[type[Divergence], Comparison] = {
    ReverseKL: lambda d, p, q: _kl(p, q),
    ForwardKL: lambda d, p, q: _kl(q, p),
    Jeffreys: lambda d, p, q: _kl(p, q) + _kl(q, p),
    GeneralizedJSD: _jsd,
    SkewForwardKL: _skew_forward,
    SkewReverseKL: _skew_reverse,
    TotalVariation: lambda d, p, q: (p - q).abs() / 2,
    Hellinger: lambda d, p, q: (p.sqrt() - q.sqrt()).square() / 2,
    PearsonChi2: lambda d, p, q: (q - p).square() / p,
    NeymanChi2: lambda d, p, q: (q - p).square() / q,
    Amari: _amari,
    ToDi: _todi,
}
TOTALS: dict[type[Divergence], Comparison] = {Renyi: _renyi, AdaptiveKL: _adaptive}


def entries(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The divergence entry by entry. A class that is not of the package speaks for itself."""
    if type(divergence) in ENTRIES:
        return ENTRIES[type(divergence)](divergence, p, q)
    return divergence.entry(p.log(), q.log())


def total(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of two laws on the last axis, each of mass 1."""
    if type(divergence) in TOTALS:
        return TOTALS[type(divergence)](divergence, p, q)
    return entries(divergence, p, q).sum(-1) if divergence.separable else divergence.total(p.log(), q.log())


def advantage(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """What the score function of each entry is weighted with: minus the derivative of its term in the student."""
    p = p.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(entries(divergence, p, q).sum(), p)
    return -slope


def _inside(support: TopK, p: Tensor, q: Tensor) -> Tensor:
    k = min(support.k, p.shape[-1])
    ours, theirs = (torch.zeros_like(law).scatter(-1, law.topk(k).indices, 1.0).bool() for law in (p.detach(), q))
    return {"student": ours, "teacher": theirs, "union": ours | theirs, "intersection": ours & theirs}[support.by]


def seen(objective: Objective, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities that every token is judged by: its own, or those of the tail that it lies in."""
    support = objective.support
    if not (isinstance(support, SampledToken) and support.k):
        return p, q
    inside = _inside(TopK(support.k, "union"), p, q)
    whole = [(law * ~inside).sum(-1, keepdim=True).clamp(min=NOTHING).expand_as(law) for law in (p, q)]
    return p.where(inside, whole[0]), q.where(inside, whole[1])


def state_divergence(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """What an objective compares at one state: a function of log-probabilities (S, V) of student and teacher."""

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (law / objective.temperature for law in (student, teacher))
        return between(objective, p.softmax(-1), q.softmax(-1), teacher.softmax(-1))

    return compare


def between(objective: Objective, p: Tensor, q: Tensor, text: Tensor) -> Tensor:
    """The same of two laws that are compared as they are; ``text`` is the law that a written token was drawn from."""
    divergence, support = objective.divergence, objective.support
    if isinstance(support, SampledToken) and support.k:
        support = TopK(support.k, "union", "tail")
    if isinstance(support, FullVocab) or support.sampled:
        return total(divergence, p, q)
    if isinstance(support, WrittenToken):
        return total(divergence, p, text)  # the text was drawn at temperature 1
    if not isinstance(support, TopK) or support.closure == "raw":  # nothing is declared for a raw sum
        direct = support.score(divergence, p.log(), q.log(), torch.zeros(len(p), dtype=torch.long)).direct
        assert direct is not None
        return direct
    inside = _inside(support, p, q)
    heads = [law.where(inside, NOTHING) for law in (p, q)]
    if support.closure == "renormalize_teacher":
        return total(divergence, p, heads[1] / heads[1].sum(-1, keepdim=True)) * inside.any(-1)
    if support.closure == "stop_gradient":
        return entries(divergence, *heads).sum(-1)
    if support.closure == "renormalize":
        return total(divergence, *(head / head.sum(-1, keepdim=True) for head in heads))
    tails = [(law * ~inside).sum(-1, keepdim=True).clamp(min=NOTHING) for law in (p, q)]
    return total(divergence, *(torch.cat(parts, -1) for parts in zip(heads, tails, strict=True)))
