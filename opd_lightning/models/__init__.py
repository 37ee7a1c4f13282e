"""Who computes log-probabilities: students, teachers, and how they are loaded."""

from opd_lightning.models.lora import LoRA
from opd_lightning.models.students import Student
from opd_lightning.models.teachers import AdapterOffTeacher, FrozenTeacher, StartTeacher, Teacher, TextTeacher
from opd_lightning.models.tiny import NewStudent
from opd_lightning.models.vocabulary import Vocabulary, VocabularyMismatch

__all__ = [
    "AdapterOffTeacher",
    "FrozenTeacher",
    "StartTeacher",
    "LoRA",
    "NewStudent",
    "Student",
    "Teacher",
    "TextTeacher",
    "Vocabulary",
    "VocabularyMismatch",
]
