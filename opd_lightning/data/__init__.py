"""Which prompts, in which order, and the rollouts in use."""

from opd_lightning.data.contexts import (
    AnswerOnly,
    Context,
    CustomContext,
    Demonstration,
    Hint,
    Instruction,
    MaskedSolution,
    ReferenceSolution,
    SystemPrompt,
)
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.data.group_contexts import Feedback, FirstOf, Judge, SiblingSuccess, Verdict
from opd_lightning.data.mixing import DistinctPrompts, MixedPrompts
from opd_lightning.data.prompts import DatasetPrompts, JsonlPrompts, PromptSet, ReasoningGymPrompts, TaskPrompts
from opd_lightning.data.selectors import ByDifficulty, ByLength, Interleaved, Selector, Shuffled, TeacherAligned
from opd_lightning.data.tasks import Addition, Task
from opd_lightning.data.templates import AutoTemplate, ChatTemplate, PlainTemplate, Template

__all__ = [
    "Addition",
    "AnswerOnly",
    "AutoTemplate",
    "ByDifficulty",
    "ByLength",
    "ChatTemplate",
    "Context",
    "CustomContext",
    "DatasetPrompts",
    "DistinctPrompts",
    "Demonstration",
    "Feedback",
    "FirstOf",
    "Hint",
    "Instruction",
    "Interleaved",
    "JsonlPrompts",
    "Judge",
    "MaskedSolution",
    "MixedPrompts",
    "PlainTemplate",
    "PromptDataModule",
    "PromptSet",
    "ReasoningGymPrompts",
    "ReferenceSolution",
    "Selector",
    "Shuffled",
    "SiblingSuccess",
    "SystemPrompt",
    "Task",
    "TaskPrompts",
    "TeacherAligned",
    "Template",
    "Verdict",
]
