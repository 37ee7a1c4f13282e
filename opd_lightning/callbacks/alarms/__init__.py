"""Alarms: what can go wrong with a run, each with the next thing to do.

Where no source stands beside a threshold it is our choice, set so that the healthy runs of the tests and of the quickstart stay
silent.
"""

from opd_lightning.callbacks.alarms.alarm import Alarm, Facts
from opd_lightning.callbacks.alarms.laws import EntropyCollapse, MassDrain, OverlapStagnation, TeacherDrift
from opd_lightning.callbacks.alarms.text import EOSLoss, LengthCollapse, LengthExplosion, PILeak, RepetitionLoop
from opd_lightning.callbacks.alarms.updates import GradientSpike, SignalOutliers, StaleRollouts

__all__ = [
    "Alarm",
    "EOSLoss",
    "EntropyCollapse",
    "Facts",
    "GradientSpike",
    "LengthCollapse",
    "LengthExplosion",
    "MassDrain",
    "OverlapStagnation",
    "PILeak",
    "RepetitionLoop",
    "SignalOutliers",
    "StaleRollouts",
    "TeacherDrift",
]
