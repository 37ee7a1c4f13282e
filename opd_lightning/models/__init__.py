"""Who computes log-probabilities: students, teachers, and how they are loaded."""

from opd_lightning.models.lora import LoRA
from opd_lightning.models.students import Student
from opd_lightning.models.teachers import (
    AdapterOffTeacher,
    CheckpointTeacher,
    CrossTokenizerTeacher,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    FunctionTeacher,
    LiveTeacher,
    PeriodicTeacher,
    RoutedTeacher,
    ServerTeacher,
    StartTeacher,
    Teacher,
    TextTeacher,
    TrustRegionTeacher,
)
from opd_lightning.models.tiny import NewStudent
from opd_lightning.models.vocabulary import Vocabulary, VocabularyMismatch

__all__ = [
    "AdapterOffTeacher",
    "CheckpointTeacher",
    "CrossTokenizerTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "FunctionTeacher",
    "LiveTeacher",
    "LoRA",
    "NewStudent",
    "PeriodicTeacher",
    "RoutedTeacher",
    "ServerTeacher",
    "StartTeacher",
    "Student",
    "Teacher",
    "TextTeacher",
    "TrustRegionTeacher",
    "Vocabulary",
    "VocabularyMismatch",
]
