"""Every divergence that `__all__` names, whoever added it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opd_lightning.inspect import textbook
from opd_lightning.objectives import divergences
from opd_lightning.objectives.divergences import (
    AdaptiveKL,
    Amari,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Hellinger,
    Jeffreys,
    NeymanChi2,
    PearsonChi2,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TotalVariation,
)
from opd_lightning.ops.logprobs import log_softmax

CLASSES = [c for n in divergences.__all__ if not inspect.isabstract(c := getattr(divergences, n))]
MEMBERS = [
    *[c() for c in CLASSES],
    *[GeneralizedJSD(b) for b in (0.1, 0.9)],
    *[GeneralizedJSD(b, "curvature") for b in (0.1, 0.7)],
    *[c(a, n) for c in (SkewForwardKL, SkewReverseKL) for a, n in ((0.1, "curvature"), (0.7, "none"))],
    *[SkewReverseKL(0.3, n, detach_mixture=True) for n in ("none", "curvature")],
    *[Amari(a) for a in (-0.9, 0.2, 0.6, 1.7)],
    *[Renyi(a, n) for a, n in ((0.3, "curvature"), (2.0, "none"), (5.0, "curvature"))],
    AdaptiveKL(0.8),
]
SEPARABLE = [d for d in MEMBERS if d.separable]
each = pytest.mark.parametrize("divergence", MEMBERS, ids=repr)
each_separable = pytest.mark.parametrize("divergence", SEPARABLE, ids=repr)
logits = hnp.arrays(np.float64, (2, 6), elements=st.floats(-6, 6))
Law = torch.Tensor


def laws(seed: int, vocab: int = 7) -> tuple[Law, Law]:
    """Student logits, teacher log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    z, w = torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    return z.requires_grad_(True), w.log_softmax(-1)


# ---- values and gradients, from probabilities (student p, teacher q), written without the code under test --------------------


def kl(p: Law, q: Law) -> Law:
    return (p * (p / q).log()).sum(-1)


def unit(d: Divergence, curvature: float) -> float:
    return curvature if d.normalize == "curvature" else 1.0


def head_weight(d: AdaptiveKL, p: Law, q: Law) -> Law:
    order = sorted(range(len(q)), key=lambda v: -float(q[v]))
    head, mass = [], 0.0
    for v in order:
        mass += float(q[v])
        if not head or mass <= d.mu:
            head.append(v)
    return (p - q).abs()[head].sum() / (p - q).abs().sum()


VALUES: dict[type, Callable[..., Law]] = {
    ReverseKL: lambda d, p, q: kl(p, q),
    ForwardKL: lambda d, p, q: kl(q, p),
    Jeffreys: lambda d, p, q: kl(p, q) + kl(q, p),
    GeneralizedJSD: lambda d, p, q: (
        (d.beta * kl(q, d.beta * q + (1 - d.beta) * p) + (1 - d.beta) * kl(p, d.beta * q + (1 - d.beta) * p))
        / unit(d, d.beta * (1 - d.beta))
    ),
    SkewForwardKL: lambda d, p, q: kl(q, d.alpha * q + (1 - d.alpha) * p) / unit(d, (1 - d.alpha) ** 2),
    SkewReverseKL: lambda d, p, q: kl(p, d.alpha * p + (1 - d.alpha) * q) / unit(d, (1 - d.alpha) ** (1 if d.frozen else 2)),
    TotalVariation: lambda d, p, q: (p - q).abs().sum() / 2,
    Hellinger: lambda d, p, q: 1 - (p * q).sqrt().sum(),
    PearsonChi2: lambda d, p, q: (q * q / p).sum() - 1,
    NeymanChi2: lambda d, p, q: (p * p / q).sum() - 1,
    Amari: lambda d, p, q: ((q**d.alpha * p ** (1 - d.alpha)).sum() - 1) / (d.alpha * (d.alpha - 1)),
    Renyi: lambda d, p, q: (q**d.alpha * p ** (1 - d.alpha)).sum().log() / (d.alpha - 1) / unit(d, d.alpha),
    AdaptiveKL: lambda d, p, q: head_weight(d, p, q) * kl(q, p) + (1 - head_weight(d, p, q)) * kl(p, q),
    ToDi: lambda d, p, q: (q / (p + q) * q * (q / p).log() + p / (p + q) * p * (p / q).log()).sum(),
}


def spread(p: Law, weights: Law) -> Law:
    """Gradient of sum_v weights_v log p_v in the logits, the weights held fixed."""
    return weights - p * weights.sum()


def skew_forward_weights(d: SkewForwardKL, p: Law, q: Law) -> Law:
    return -(1 - d.alpha) * p * q / (d.alpha * q + (1 - d.alpha) * p) / unit(d, (1 - d.alpha) ** 2)


def skew_reverse_weights(d: SkewReverseKL, p: Law, q: Law) -> Law:
    m = d.alpha * p + (1 - d.alpha) * q
    if d.frozen:
        return p * (p / m).log() / unit(d, 1 - d.alpha)
    return p * ((p / m).log() + (1 - d.alpha) * q / m) / unit(d, (1 - d.alpha) ** 2)


def power_weights(alpha: float, p: Law, q: Law) -> Law:
    return -(q**alpha) * p ** (1 - alpha) / alpha


WEIGHTS: dict[type, Callable[..., Law]] = {
    ReverseKL: lambda d, p, q: p * (p / q).log(),
    ForwardKL: lambda d, p, q: -q,
    Jeffreys: lambda d, p, q: p * (p / q).log() - q,
    GeneralizedJSD: lambda d, p, q: (
        (1 - d.beta) * p * (p / (d.beta * q + (1 - d.beta) * p)).log() / unit(d, d.beta * (1 - d.beta))
    ),
    SkewForwardKL: skew_forward_weights,
    SkewReverseKL: skew_reverse_weights,
    TotalVariation: lambda d, p, q: p * (p - q).sign() / 2,
    Hellinger: lambda d, p, q: -(p * q).sqrt() / 2,
    PearsonChi2: lambda d, p, q: -q * q / p,
    NeymanChi2: lambda d, p, q: 2 * p * p / q,
    Amari: lambda d, p, q: power_weights(d.alpha, p, q),
    Renyi: lambda d, p, q: -(q**d.alpha) * p ** (1 - d.alpha) / (q**d.alpha * p ** (1 - d.alpha)).sum() / unit(d, d.alpha),
    AdaptiveKL: lambda d, p, q: -head_weight(d, p, q) * q + (1 - head_weight(d, p, q)) * p * (p / q).log(),
    ToDi: lambda d, p, q: -q / (p + q) * q + p / (p + q) * p * ((p / q).log() + 1),
}


@each
@given(logits)
@settings(max_examples=25, deadline=None)
def test_value_and_gradient_follow_the_definition(divergence: Divergence, values: np.ndarray) -> None:
    z, w = torch.tensor(values[0], requires_grad=True), torch.tensor(values[1])
    s, t = log_softmax(z), log_softmax(w)
    p, q = z.detach().softmax(-1), w.softmax(-1)
    mine = divergence.total(s, t)
    theirs = VALUES[type(divergence)](divergence, p, q)
    torch.testing.assert_close(mine.detach(), theirs.nan_to_num(), atol=1e-12, rtol=1e-9)  # AKL: 0 / 0 where equal
    (gradient,) = torch.autograd.grad(mine, z)
    if not (divergence.curvature == math.inf and (p - q).abs().min() < 1e-12):  # at a kink any sign will do
        expected = spread(p, WEIGHTS[type(divergence)](divergence, p, q)).nan_to_num()
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)
    if divergence.separable:
        torch.testing.assert_close(divergence.raw(s, t).sum().detach(), theirs, atol=1e-12, rtol=1e-9)


@each
def test_closed_form_gradients_to_the_last_digits(divergence: Divergence) -> None:
    for seed in range(5):
        z, t = laws(seed)
        (gradient,) = torch.autograd.grad(divergence.total(z.log_softmax(-1), t), z)
        p, q = z.detach().softmax(-1), t.exp()
        assert (gradient - spread(p, WEIGHTS[type(divergence)](divergence, p, q))).abs().max() < 1e-12


@each
def test_the_oracles_formulas_agree(divergence: Divergence) -> None:
    assert type(divergence) in textbook.ENTRIES or type(divergence) in textbook.TOTALS
    z, t = laws(11)
    p, q = z.softmax(-1), t.exp()
    theirs = textbook.total(divergence, p, q)
    torch.testing.assert_close(theirs.detach(), VALUES[type(divergence)](divergence, p.detach(), q), atol=1e-12, rtol=0.0)
    (gradient,) = torch.autograd.grad(theirs, z, retain_graph=True)
    expected = spread(p.detach(), WEIGHTS[type(divergence)](divergence, p.detach(), q))
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0.0)


@each_separable
@given(logits)
@settings(max_examples=25, deadline=None)
def test_every_entry_is_at_least_zero_and_zero_when_equal(divergence: Divergence, values: np.ndarray) -> None:
    s, t = log_softmax(torch.tensor(values[0])), log_softmax(torch.tensor(values[1]))
    entry = divergence.entry(s, t)
    assert (entry >= -1e-12 * (1 + entry.abs().max())).all()
    assert divergence.entry(s, s).abs().max() < 1e-12


@each
def test_zero_with_zero_gradient_where_the_two_agree(divergence: Divergence) -> None:
    z, _ = laws(3)
    s, same = z.log_softmax(-1), z.detach().log_softmax(-1)
    assert abs(divergence.total(s, same).item()) < 1e-12
    (gradient,) = torch.autograd.grad(divergence.total(s, same), z, retain_graph=True)
    assert gradient.abs().max() < 1e-12
    if divergence.separable:  # entry by entry, so on every truncated support too
        (per_entry,) = torch.autograd.grad(divergence.entry(s, same).sum(), s)
        assert per_entry.abs().max() < 1e-12
        (per_entry,) = torch.autograd.grad(divergence.raw(s := z.log_softmax(-1), same).sum(), s)
        torch.testing.assert_close(per_entry, -raw_slope(divergence) * s.exp(), atol=1e-12, rtol=1e-9)


def raw_slope(divergence: Divergence) -> float:
    if isinstance(divergence, SkewReverseKL) and divergence.frozen:  # d/dp of p log(p / m) with m fixed
        return -1.0 / (1 - divergence.alpha) if divergence.normalize == "curvature" else -1.0
    return divergence.slope


@each_separable
def test_the_advantage_is_the_score_function_weight(divergence: Divergence) -> None:
    """E[-A grad log p] over the student's tokens is the exact gradient; A(1) = 0; the value is unbiased."""
    for seed in range(3):
        z, teacher = laws(seed)
        s = z.log_softmax(-1)
        (exact,) = torch.autograd.grad(divergence.entry(s, teacher).sum(), z, retain_graph=True)
        weight = divergence.advantage(s, teacher).detach()
        (sampled,) = torch.autograd.grad(-(s.exp().detach() * weight * s).sum(), z)
        torch.testing.assert_close(sampled, exact, atol=1e-12, rtol=1e-9)
        assert divergence.advantage(s, s).abs().max() < 1e-12
        torch.testing.assert_close((s.exp() * divergence.value(s, teacher)).sum(), divergence.entry(s, teacher).sum())


@each
def test_declared_curvature(divergence: Divergence) -> None:
    """Near agreement the gradient is curvature times that of 1/2 sum (p - q)^2 / p."""
    z, _ = laws(2)
    direction = torch.randn(7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def slope(step: float) -> float:
        """Directional derivative, from the gradient: what is held fixed stays fixed."""
        at = (z.detach() + step * direction).requires_grad_(True)
        (gradient,) = torch.autograd.grad(divergence.total(at.log_softmax(-1), z.detach().log_softmax(-1)), at)
        return float(gradient @ direction)

    p = z.detach().softmax(-1)
    fisher = float((p * direction**2).sum() - (p * direction).sum() ** 2)
    if divergence.curvature == math.inf:
        assert slope(1e-5) == pytest.approx(slope(1e-3), rel=0.01)  # a kink: the gradient does not fade
        assert slope(1e-5) > 1e-2
        return
    assert (slope(1e-4) - slope(-1e-4)) / 2e-4 == pytest.approx(divergence.curvature * fisher, rel=1e-3)
    if not divergence.frozen:
        value = [divergence.total((z + h * direction).log_softmax(-1), z.log_softmax(-1)).item() for h in (1e-3, 0.0, -1e-3)]
        assert (value[0] - 2 * value[1] + value[2]) / 1e-6 == pytest.approx(divergence.curvature * fisher, rel=1e-3)


@each
def test_permuting_the_vocabulary_changes_nothing(divergence: Divergence) -> None:
    s, t = torch.randn(2, 4, 9, dtype=torch.float64).log_softmax(-1)
    order = torch.randperm(9)
    torch.testing.assert_close(divergence.total(s, t), divergence.total(s[:, order], t[:, order]))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries_and_certain_laws_stay_finite(divergence: Divergence, dtype: torch.dtype) -> None:
    """-inf logits in both, a one-hot teacher, a one-hot student, p = q, far tails: no NaN in value or gradient."""
    inf = math.inf
    far = 80.0 if dtype == torch.float32 else 700.0
    cases = [
        ([1.0, 2.0, -inf], [0.5, 1.0, -inf]),  # the same padded entry in both
        ([1.0, 2.0, 0.0], [0.0, -inf, -inf]),  # certain teacher
        ([0.0, -inf, -inf], [1.0, 2.0, 0.0]),  # certain student
        ([0.0, -inf, -inf], [-inf, 0.0, -inf]),  # certain of different tokens
        ([0.0, -inf, -inf], [0.0, -inf, -inf]),  # certain of the same
        ([0.3, 0.3, -inf], [0.3, 0.3, -inf]),  # equal
        ([far, 0.0, 0.0], [0.0, far, 0.0]),  # opposite
    ]
    for student, teacher in cases:
        z = torch.tensor(student, dtype=dtype, requires_grad=True)
        s, t = log_softmax(z), log_softmax(torch.tensor(teacher, dtype=dtype))
        values = [divergence.total(s, t)]
        if divergence.separable:
            values += [divergence.entry(s, t).sum(), divergence.raw(s, t).sum()]
        for value in values:
            (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
            assert torch.isfinite(value), (student, teacher)
            assert torch.isfinite(gradient).all(), (student, teacher)


@each
def test_float32_is_float64_rounded(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(0)
    z, w = 3 * torch.randn(2, 8, 50, generator=generator, dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        at = z.to(dtype).requires_grad_(True)
        value = divergence.total(log_softmax(at), log_softmax(w.to(dtype)))
        found.append((value.detach().double(), torch.autograd.grad(value.sum(), at)[0].double()))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5)


# ---- families ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("near", "end", "factor"),
    [
        (lambda e: GeneralizedJSD(e, "curvature"), ForwardKL(), 1.0),
        (lambda e: GeneralizedJSD(1 - e, "curvature"), ReverseKL(), 1.0),
        (lambda e: SkewForwardKL(e, "curvature"), ForwardKL(), 1.0),
        (lambda e: SkewForwardKL(1 - e, "curvature"), NeymanChi2(), 0.5),
        (lambda e: SkewReverseKL(e, "curvature"), ReverseKL(), 1.0),
        (lambda e: SkewReverseKL(1 - e, "curvature"), PearsonChi2(), 0.5),
        (lambda e: Amari(e), ReverseKL(), 1.0),
        (lambda e: Amari(-e), ReverseKL(), 1.0),
        (lambda e: Amari(1 - e), ForwardKL(), 1.0),
        (lambda e: Amari(1 + e), ForwardKL(), 1.0),
        (lambda e: Amari(2 - e), PearsonChi2(), 0.5),
        (lambda e: Amari(e - 1), NeymanChi2(), 0.5),
        (lambda e: Amari(0.5 + e), Hellinger(), 4.0),
        (lambda e: Renyi(e, "curvature"), ReverseKL(), 1.0),
        (lambda e: Renyi(1 - e, "curvature"), ForwardKL(), 1.0),
        (lambda e: Renyi(1 + e), ForwardKL(), 1.0),
    ],
)
def test_families_are_continuous_to_their_ends(near: Callable[[float], Divergence], end: Divergence, factor: float) -> None:
    for seed in range(3):
        z, t = laws(seed, vocab=5)
        value, limit = near(1e-5).total(z.log_softmax(-1), t), factor * end.total(z.log_softmax(-1), t)
        torch.testing.assert_close(value, limit, rtol=2e-3, atol=1e-6)
        gradient, expected = (torch.autograd.grad(x, z)[0] for x in (value, limit))
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-3)


def test_amari_keeps_its_digits_near_the_kls_in_float32() -> None:
    s, t = (x.float() for x in torch.randn(2, 20, dtype=torch.float64).log_softmax(-1))
    for alpha, end in ((1e-6, ReverseKL()), (1 - 1e-6, ForwardKL())):
        torch.testing.assert_close(Amari(alpha).total(s, t), end.total(s, t), rtol=1e-4, atol=1e-6)


def test_published_sizes_vanish_at_the_ends() -> None:
    z, t = laws(0)
    s = z.log_softmax(-1)
    for divergence in (GeneralizedJSD(1e-6), SkewForwardKL(1 - 1e-6), SkewReverseKL(1 - 1e-6), Renyi(1e-6)):
        assert 0 <= divergence.total(s, t).item() < 1e-5


def test_a_fixed_mixture_leads_from_the_reverse_to_the_forward_kl_in_gradient() -> None:
    """Same value as the skew reverse KL, another gradient: of order 1 - alpha, not its square."""
    z, t = laws(4)
    s = z.log_softmax(-1)
    torch.testing.assert_close(SkewReverseKL(0.3, detach_mixture=True).total(s, t), SkewReverseKL(0.3).total(s, t))
    for alpha, end in ((1e-6, ReverseKL()), (1 - 1e-6, ForwardKL())):
        fixed = SkewReverseKL(alpha, "curvature", detach_mixture=True)
        (gradient,) = torch.autograd.grad(fixed.total(s, t), z, retain_graph=True)
        (expected,) = torch.autograd.grad(end.total(s, t), z, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_todi_is_jeffreys_in_value_and_not_in_gradient() -> None:
    z, t = laws(6)
    s = z.log_softmax(-1)
    torch.testing.assert_close(ToDi().entry(s, t), Jeffreys().entry(s, t), atol=1e-14, rtol=0.0)
    todi, jeffreys = (torch.autograd.grad(d.total(s, t), z, retain_graph=True)[0] for d in (ToDi(), Jeffreys()))
    assert (todi - jeffreys).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GeneralizedJSD(0.0), r"beta=0.0.*strictly between 0 and 1. Write `divergence: ForwardKL`"),
        (lambda: GeneralizedJSD(1.0), r"beta=1.0.*strictly between 0 and 1. Write `divergence: ReverseKL`"),
        (lambda: GeneralizedJSD(-0.1), "strictly between 0 and 1"),
        (lambda: GeneralizedJSD(1.5), "strictly between 0 and 1"),
        (lambda: GeneralizedJSD(math.nan), "strictly between 0 and 1"),
        (lambda: SkewForwardKL(0.0), "Write `divergence: ForwardKL`"),
        (lambda: SkewReverseKL(0.0), "Write `divergence: ReverseKL`"),
        (lambda: SkewReverseKL(1.0), "Write `divergence: PearsonChi2`"),
        (lambda: Amari(0.0), r"between -1 and 2 and differ from 0, 1. Write `divergence: ReverseKL` for alpha = 0"),
        (lambda: Amari(1.0), "Write `divergence: ForwardKL`"),
        (lambda: Amari(2.0), "Write `divergence: PearsonChi2`"),
        (lambda: Amari(-3.0), "Write `divergence: NeymanChi2`"),
        (lambda: Renyi(1.0), r"between 0 and inf and differ from 1. Write `divergence: ForwardKL`"),
        (lambda: Renyi(0.0), "Write `divergence: ReverseKL`"),
        (lambda: AdaptiveKL(1.0), "Write `divergence: ForwardKL`"),
        (lambda: AdaptiveKL(0.0), "mu must lie strictly between 0 and 1"),
    ],
)
def test_parameters_outside_their_bounds_say_what_to_write(make: Callable[[], Divergence], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("divergence", [d for d in MEMBERS if not d.separable], ids=repr)
def test_an_inseparable_divergence_has_no_entries(divergence: Divergence) -> None:
    s, t = torch.randn(2, 5).log_softmax(-1)
    for method in (divergence.entry, divergence.raw, divergence.advantage, divergence.value):
        with pytest.raises(TypeError, match="use `total` on whole laws"):
            method(s, t)


@each
def test_the_value_of_a_token_is_no_advantage_but_for_the_reverse_kl(divergence: Divergence) -> None:
    """Held fixed, minus what the divergence is at the drawn token has its mean right and its gradient wrong. The reverse KL is
    the exception, also that to a mixture held fixed.
    """
    if not divergence.separable:
        return
    z, w = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    z.requires_grad_(True)
    s, t = log_softmax(z), log_softmax(w)
    (exact,) = torch.autograd.grad(divergence.total(s, t).sum(), z, retain_graph=True)
    weight = (s.exp() * divergence.value(s, t)).detach()
    (found,) = torch.autograd.grad((weight * s).sum(), z)
    off = float((found - exact).norm() / exact.norm())
    reverse = isinstance(divergence, ReverseKL) or (isinstance(divergence, SkewReverseKL) and divergence.frozen)
    assert off < 1e-12 if reverse else off > 1e-2


def test_a_certain_teacher_tells_the_directions_apart() -> None:
    """Uniform student: the forward KL is log V, the reverse KL as large as the floor of the logarithm lets it be."""
    s = log_softmax(torch.zeros(1, 4, dtype=torch.float64))
    t = log_softmax(torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float64))
    assert ForwardKL().total(s, t).item() == pytest.approx(math.log(4))
    assert ReverseKL().total(s, t).item() > 500
