"""Rollout engines: prompts in, completions with their recorded log-probabilities out."""

from opd_lightning.samplers.native import NativeSampler

__all__ = ["NativeSampler"]
