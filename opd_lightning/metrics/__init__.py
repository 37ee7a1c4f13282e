"""Numbers: token-weighted means, agreement, graders, and the catalogue of everything that is logged."""

from opd_lightning.metrics.agreement import (
    EntropyGap,
    Imbalance,
    NegativeShare,
    OverlapAdvantage,
    OverlapMass,
    TopKMass,
    TopKOverlap,
)
from opd_lightning.metrics.by_position import ByPosition
from opd_lightning.metrics.graders import Contains, ExactMatch, Grader, NumberMatch, RegexMatch
from opd_lightning.metrics.signal import AscentShare, SuppressionLeak, TeacherReach
from opd_lightning.metrics.text import DistinctNGrams, Leak, Repetition, told_elsewhere
from opd_lightning.metrics.token_mean import PassAtK, TokenMean

__all__ = [
    "AscentShare",
    "ByPosition",
    "DistinctNGrams",
    "EntropyGap",
    "Contains",
    "ExactMatch",
    "Grader",
    "Imbalance",
    "Leak",
    "NegativeShare",
    "NumberMatch",
    "OverlapAdvantage",
    "OverlapMass",
    "PassAtK",
    "RegexMatch",
    "Repetition",
    "SuppressionLeak",
    "TeacherReach",
    "TokenMean",
    "TopKMass",
    "TopKOverlap",
    "told_elsewhere",
]
