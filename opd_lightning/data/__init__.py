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
from opd_lightning.data.prompts import DatasetPrompts, JsonlPrompts, PromptSet, ReasoningGymPrompts, TaskPrompts
from opd_lightning.data.selectors import ByDifficulty, ByLength, Selector, Shuffled
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
    "Demonstration",
    "Feedback",
    "FirstOf",
    "Hint",
    "Instruction",
    "JsonlPrompts",
    "Judge",
    "MaskedSolution",
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
    "Template",
    "Verdict",
]
