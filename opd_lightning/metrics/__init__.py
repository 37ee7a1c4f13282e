"""Numbers: token-weighted means, agreement, graders, and the catalogue of everything that is logged."""

from opd_lightning.metrics.agreement import EntropyGap, OverlapAdvantage, OverlapMass, TopKOverlap
from opd_lightning.metrics.graders import ExactMatch, Grader, NumberMatch, RegexMatch
from opd_lightning.metrics.token_mean import PassAtK, TokenMean

__all__ = [
    "EntropyGap",
    "ExactMatch",
    "Grader",
    "NumberMatch",
    "OverlapAdvantage",
    "OverlapMass",
    "PassAtK",
    "RegexMatch",
    "TokenMean",
    "TopKOverlap",
]
