"""On-policy distillation of language models, on a laptop and, unchanged, on eight GPUs.

The student writes completions, the teacher scores every token of them, and the gap becomes the update. The names below are what
a notebook needs; everything else has a module of its own (`opd_lightning.objectives`, `opd_lightning.models`, ...). They are
imported when first used, so that ``import opd_lightning`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Addition": "data",
    "AgreementMonitor": "callbacks",
    "ColdStart": "callbacks",
    "CompletionEval": "callbacks",
    "EntropyMonitor": "callbacks",
    "FrozenTeacher": "models",
    "LoRA": "models",
    "NativeSampler": "samplers",
    "Objective": "objectives",
    "OPDModule": "module",
    "OPDTrainer": "trainer",
    "PromptDataModule": "data",
    "ReverseKL": "objectives",
    "Rollout": "types",
    "RolloutRefresh": "callbacks",
    "Student": "models",
    "TaskPrompts": "data",
    "steps": "notebook",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"opd_lightning.{_HOME[name]}"), name)
    raise AttributeError(f"module 'opd_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
