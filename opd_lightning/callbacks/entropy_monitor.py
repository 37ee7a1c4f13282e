"""EntropyMonitor: where in the completion is the student still a distribution?"""

from __future__ import annotations

from torch import Tensor

from opd_lightning.callbacks.step_monitor import StepMonitor
from opd_lightning.types import ObjectiveOutput, Rollout


class EntropyMonitor(StepMonitor):
    """Logs the entropy of student and teacher by position in the completion, beside the means that every run logs. A
    fall of the mean is watched by `EntropyCollapse`.

    Args:
        edges: upper edges of the position buckets, in completion tokens; the last bucket is open. null is 16, 64 and 256.

    Raises:
        ValueError: for edges that do not increase.
    """

    def __init__(self, edges: list[int] | None = None) -> None:
        super().__init__()
        self.edges = [16, 64, 256] if edges is None else edges
        if self.edges != sorted(set(self.edges)) or any(e < 1 for e in self.edges):
            raise ValueError(f"EntropyMonitor(edges={edges}): edges must be positive and increase")

    def collect(self, output: ObjectiveOutput, rollout: Rollout) -> dict[str, Tensor]:
        found = {}
        lows, highs = [0, *self.edges], [*self.edges, None]
        for who in ("student", "teacher"):
            values = output.stats.values.get(f"{who}_entropy")
            if values is None:
                continue
            for low, high in zip(lows, highs, strict=True):
                inside = output.stats.position >= low
                if high is not None:
                    inside &= output.stats.position < high
                found[f"train/{who}_entropy/{low}-{'' if high is None else high - 1}"] = values[inside]
        return found
