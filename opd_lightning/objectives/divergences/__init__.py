"""What is compared at one vocabulary entry: the divergences, always (student, teacher), in nats."""

from opd_lightning.objectives.divergences.adaptive import AdaptiveKL, ToDi
from opd_lightning.objectives.divergences.base import Divergence, Inseparable
from opd_lightning.objectives.divergences.f_divergences import (
    Amari,
    Hellinger,
    NeymanChi2,
    PearsonChi2,
    Renyi,
    TotalVariation,
)
from opd_lightning.objectives.divergences.kl import (
    ForwardKL,
    GeneralizedJSD,
    Jeffreys,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)

__all__ = [
    "AdaptiveKL",
    "Amari",
    "Divergence",
    "ForwardKL",
    "GeneralizedJSD",
    "Hellinger",
    "Inseparable",
    "Jeffreys",
    "NeymanChi2",
    "PearsonChi2",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "ToDi",
    "TotalVariation",
]
