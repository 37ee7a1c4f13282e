"""Every divergence that `__all__` names, whoever added it."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opd_lightning.objectives import divergences
from opd_lightning.objectives.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opd_lightning.ops.logprobs import log_softmax

CLASSES = [c for n in divergences.__all__ if not inspect.isabstract(c := getattr(divergences, n))]
MEMBERS = [
    *[c() for c in CLASSES],
    GeneralizedJSD(0.1),
    GeneralizedJSD(0.9),
    GeneralizedJSD(0.1, "curvature"),
    GeneralizedJSD(0.7, "curvature"),
]
each = pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
logits = hnp.arrays(np.float64, (2, 6), elements=st.floats(-6, 6))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


def by_definition(d: Divergence, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """From probabilities (student p, teacher q), written without the code under test."""
    if isinstance(d, ReverseKL):
        return kl(p, q)
    if isinstance(d, ForwardKL):
        return kl(q, p)
    assert isinstance(d, GeneralizedJSD)
    m = d.beta * q + (1 - d.beta) * p
    value = d.beta * kl(q, m) + (1 - d.beta) * kl(p, m)
    return value / (d.beta * (1 - d.beta)) if d.normalize == "curvature" else value


@each
@given(logits)
@settings(max_examples=30, deadline=None)
def test_value_and_gradient_follow_the_definition(divergence: Divergence, values: np.ndarray) -> None:
    z, w = torch.tensor(values[:1], requires_grad=True), torch.tensor(values[1:])
    mine = divergence.entry(log_softmax(z), log_softmax(w)).sum()
    theirs = by_definition(divergence, z.softmax(-1), w.softmax(-1)).sum()
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)
    (a,), (b,) = torch.autograd.grad(mine, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    raw = divergence.raw(log_softmax(z), log_softmax(w)).sum()
    torch.testing.assert_close(raw, theirs, atol=1e-12, rtol=1e-9)


@each
@given(logits)
@settings(max_examples=30, deadline=None)
def test_every_entry_is_at_least_zero_and_zero_when_equal(divergence: Divergence, values: np.ndarray) -> None:
    s, t = log_softmax(torch.tensor(values[0])), log_softmax(torch.tensor(values[1]))
    assert (divergence.entry(s, t) >= -1e-12).all()
    assert divergence.entry(s, s).abs().max() < 1e-12


@each
def test_the_advantage_is_the_score_function_weight(divergence: Divergence) -> None:
    """E[-A grad log p] over the student's tokens is the exact gradient; A(1) = 0; the value is unbiased."""
    torch.manual_seed(1)
    z, teacher = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    s = z.log_softmax(-1)
    (exact,) = torch.autograd.grad(divergence.entry(s, teacher).sum(), z, retain_graph=True)
    weight = divergence.advantage(s, teacher).detach()
    (sampled,) = torch.autograd.grad(-(s.exp().detach() * weight * s).sum(), z)
    torch.testing.assert_close(sampled, exact, atol=1e-12, rtol=1e-9)
    assert divergence.advantage(s, s).abs().max() < 1e-12
    torch.testing.assert_close((s.exp() * divergence.value(s, teacher)).sum(), divergence.entry(s, teacher).sum())


@each
def test_declared_curvature(divergence: Divergence) -> None:
    """D is about curvature / 2 * sum (p - q)^2 / p near agreement."""
    torch.manual_seed(2)
    z = torch.randn(6, dtype=torch.float64)
    s, t = z.log_softmax(-1), (z + 1e-4 * torch.randn(6, dtype=torch.float64)).log_softmax(-1)
    quadratic = ((s.exp() - t.exp()).square() / s.exp()).sum() / 2
    assert divergence.entry(s, t).sum().item() == pytest.approx(divergence.curvature * quadratic.item(), rel=1e-3)


@each
def test_permuting_the_vocabulary_changes_nothing(divergence: Divergence) -> None:
    s, t = torch.randn(2, 4, 9, dtype=torch.float64).log_softmax(-1)
    order = torch.randperm(9)
    torch.testing.assert_close(divergence.entry(s, t).sum(-1), divergence.entry(s[:, order], t[:, order]).sum(-1))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries_and_certain_laws_stay_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    """-inf logits in both, a one-hot teacher, a one-hot student, p = q: no NaN in value or gradient."""
    inf = math.inf
    cases = [
        ([1.0, 2.0, -inf], [0.5, 1.0, -inf]),  # the same padded entry in both
        ([1.0, 2.0, 0.0], [0.0, -inf, -inf]),  # certain teacher
        ([0.0, -inf, -inf], [1.0, 2.0, 0.0]),  # certain student
        ([0.3, 0.3, -inf], [0.3, 0.3, -inf]),  # equal
    ]
    for student, teacher in cases:
        z = torch.tensor(student, dtype=dtype, requires_grad=True)
        s, t = log_softmax(z), log_softmax(torch.tensor(teacher, dtype=dtype))
        for method in (divergence.entry, divergence.raw):
            (gradient,) = torch.autograd.grad(method(s, t).sum(), z, retain_graph=True)
            assert torch.isfinite(method(s, t)).all()
            assert torch.isfinite(gradient).all()


def test_jsd_ends_tend_to_the_two_kls_in_unit_curvature() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    near_zero, near_one = (GeneralizedJSD(b, "curvature").entry(s, t).sum().item() for b in (1e-6, 1 - 1e-6))
    assert near_zero == pytest.approx(ForwardKL().entry(s, t).sum().item(), rel=1e-4)
    assert near_one == pytest.approx(ReverseKL().entry(s, t).sum().item(), rel=1e-4)
    assert GeneralizedJSD(1e-6).entry(s, t).sum() < 1e-5  # the published form vanishes there


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_its_ends(beta: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        GeneralizedJSD(beta)
