"""One of everything that an objective is composed of, and the small worlds in which all combinations are enumerated."""

from __future__ import annotations

from opd_lightning.inspect.oracle import TabularWorld
from opd_lightning.objectives import (
    AdaptiveKL,
    Amari,
    ClosedFormBaseline,
    Constant,
    Discounted,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    Hellinger,
    Immediate,
    Jeffreys,
    NeymanChi2,
    NoBaseline,
    PearsonChi2,
    Renyi,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    SkewForwardKL,
    SkewReverseKL,
    ToDi,
    TokenMean,
    TopK,
    TotalVariation,
    WrittenToken,
)

DIVERGENCES = [ReverseKL(), ForwardKL(), GeneralizedJSD(0.3), GeneralizedJSD(0.8, "curvature")]
FURTHER = [
    SkewForwardKL(0.1),
    SkewForwardKL(0.4, "curvature"),
    SkewReverseKL(0.1),
    SkewReverseKL(0.4, "curvature", detach_mixture=True),
    TotalVariation(),
    Hellinger(),
    PearsonChi2(),
    NeymanChi2(),
    Amari(0.3),
    Amari(0.8),
    Renyi(0.3, "curvature"),
    Renyi(2.0),
    Jeffreys(),
    AdaptiveKL(),
    ToDi(),
]
TOPKS = [
    TopK(k, by, closure)
    for k in (1, 2, 3)
    for by in ("student", "teacher", "union", "intersection")
    for closure in ("tail", "renormalize", "stop_gradient", "raw")
]
SUPPORTS = [FullVocab(), SampledToken(), WrittenToken(), SampledToken(1), *TOPKS]
FEWER = [  # every closure and every chooser once: what they do does not depend on the divergence
    *SUPPORTS[:4],
    TopK(2, "student", "tail"),
    TopK(2, "teacher", "stop_gradient"),
    TopK(2, "union", "renormalize"),
    TopK(2, "intersection", "tail"),
    TopK(1, "student", "renormalize"),
    TopK(2, "teacher", "raw"),
]
CREDITS = [Immediate(), Discounted(0.4), ReturnToGo()]
BASELINES = [NoBaseline(), ClosedFormBaseline()]
REDUCTIONS = [TokenMean(), SequenceMean(), Constant(2.0)]
WORLDS = {
    "fixed": TabularWorld.random(vocab=4, horizon=2, seed=0),
    "eos": TabularWorld.random(vocab=3, horizon=3, seed=1, eos=2),
}
