"""Rollout engines: prompts in, completions with their recorded log-probabilities out."""

from opd_lightning.samplers.native import NativeSampler
from opd_lightning.samplers.vllm import VLLMSampler

__all__ = ["NativeSampler", "VLLMSampler"]
