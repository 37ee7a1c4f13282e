"""Teachers: who answers on the student's states.

A teacher is a plain object, never a submodule of the LightningModule: so it has no entry in optimizers or DDP buckets, and
`train()` never reaches it. Only what cannot be made again from the configuration (a moving average) enters checkpoints, under
a key of its own.
"""

from opd_lightning.models.teachers.base import AdapterOffTeacher, FrozenTeacher, StartTeacher, Teacher, TextTeacher
from opd_lightning.models.teachers.checkpoint import CheckpointTeacher
from opd_lightning.models.teachers.mixed import EnsembleTeacher, FunctionTeacher, RoutedTeacher, TrustRegionTeacher
from opd_lightning.models.teachers.moving import EMATeacher, LiveTeacher, PeriodicTeacher
from opd_lightning.models.teachers.server import ServerTeacher
from opd_lightning.models.teachers.translated import CrossTokenizerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CheckpointTeacher",
    "CrossTokenizerTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "FunctionTeacher",
    "LiveTeacher",
    "PeriodicTeacher",
    "RoutedTeacher",
    "ServerTeacher",
    "StartTeacher",
    "Teacher",
    "TextTeacher",
    "TrustRegionTeacher",
]
