"""Which prompts, in which order, and the rollouts in use."""

from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.data.prompts import DatasetPrompts, JsonlPrompts, PromptSet, ReasoningGymPrompts, TaskPrompts
from opd_lightning.data.selectors import ByDifficulty, ByLength, Selector, Shuffled
from opd_lightning.data.tasks import Addition, Task
from opd_lightning.data.templates import AutoTemplate, ChatTemplate, PlainTemplate, Template

__all__ = [
    "Addition",
    "AutoTemplate",
    "ByDifficulty",
    "ByLength",
    "ChatTemplate",
    "DatasetPrompts",
    "JsonlPrompts",
    "PlainTemplate",
    "PromptDataModule",
    "PromptSet",
    "ReasoningGymPrompts",
    "Selector",
    "Shuffled",
    "Task",
    "TaskPrompts",
    "Template",
]
