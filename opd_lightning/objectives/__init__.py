"""Objectives: from the scores of a rollout to a loss. One axis, one module; one choice, one class."""

from opd_lightning.objectives.credits import (
    Baseline,
    ClosedFormBaseline,
    Credit,
    Discounted,
    Immediate,
    NoBaseline,
    ReturnToGo,
)
from opd_lightning.objectives.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opd_lightning.objectives.objective import Objective
from opd_lightning.objectives.reductions import Constant, Reduction, SequenceMean, TokenMean
from opd_lightning.objectives.supports import FullVocab, SampledToken, Support, TopK, WrittenToken
from opd_lightning.objectives.validate import DeclaredTarget, DegenerateObjective

__all__ = [
    "Baseline",
    "ClosedFormBaseline",
    "Constant",
    "Credit",
    "DeclaredTarget",
    "DegenerateObjective",
    "Discounted",
    "Divergence",
    "ForwardKL",
    "FullVocab",
    "GeneralizedJSD",
    "Immediate",
    "NoBaseline",
    "Objective",
    "Reduction",
    "ReturnToGo",
    "ReverseKL",
    "SampledToken",
    "SequenceMean",
    "Support",
    "TokenMean",
    "TopK",
    "WrittenToken",
]
