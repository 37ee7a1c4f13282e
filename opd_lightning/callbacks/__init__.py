"""When: everything that happens around the training step."""

from opd_lightning.callbacks.agreement_monitor import AgreementMonitor
from opd_lightning.callbacks.alarms import (
    Alarm,
    EntropyCollapse,
    EOSLoss,
    GradientSpike,
    LengthCollapse,
    LengthExplosion,
    MassDrain,
    OverlapStagnation,
    PILeak,
    RepetitionLoop,
    SignalOutliers,
    StaleRollouts,
    TeacherDrift,
)
from opd_lightning.callbacks.cold_start import ColdStart
from opd_lightning.callbacks.completion_eval import CompletionEval
from opd_lightning.callbacks.completion_table import CompletionTable
from opd_lightning.callbacks.entropy_monitor import EntropyMonitor
from opd_lightning.callbacks.position_map import PositionMap
from opd_lightning.callbacks.progress import OPDProgressBar, TimeTable
from opd_lightning.callbacks.readiness import Readiness
from opd_lightning.callbacks.recovery import FiniteLoss, GracefulStop, OPDCheckpoint, RNGState
from opd_lightning.callbacks.rollout_refresh import RolloutRefresh
from opd_lightning.callbacks.run_card import RunCard
from opd_lightning.callbacks.step_monitor import StepMonitor, TrainMonitor
from opd_lightning.callbacks.teacher_update import TeacherUpdate
from opd_lightning.callbacks.token_records import TokenRecords
from opd_lightning.callbacks.watch import Alarms
from opd_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "AgreementMonitor",
    "Alarm",
    "Alarms",
    "ColdStart",
    "CompletionEval",
    "CompletionTable",
    "EOSLoss",
    "EntropyCollapse",
    "EntropyMonitor",
    "FiniteLoss",
    "GracefulStop",
    "GradientSpike",
    "LengthCollapse",
    "LengthExplosion",
    "MassDrain",
    "OPDCheckpoint",
    "OPDProgressBar",
    "OverlapStagnation",
    "PILeak",
    "PositionMap",
    "RNGState",
    "Readiness",
    "RepetitionLoop",
    "RolloutRefresh",
    "RunCard",
    "SignalOutliers",
    "StaleRollouts",
    "StepMonitor",
    "TeacherDrift",
    "TeacherUpdate",
    "TimeTable",
    "TokenRecords",
    "TrainMonitor",
    "Watchdog",
]
