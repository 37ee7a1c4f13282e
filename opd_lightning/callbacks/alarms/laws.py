"""Alarms over what the two models would write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from opd_lightning.callbacks.alarms.alarm import SETTLE, Alarm, Facts


class EntropyCollapse(Alarm):
    """The student's entropy falls below a share of the teacher's on the same states, or below a floor. It writes one completion
    a prompt then, and learns nothing from the next ones.

    Args:
        share: of the teacher's entropy.
        floor: in nats per token; 0 leaves it out.
        patience: optimizer steps.
    """

    advice = "lower the learning rate, distil with more of the forward KL (GeneralizedJSD), or look at the rollouts"

    def __init__(self, share: float = 0.2, floor: float = 0.0, patience: int = 5) -> None:
        super().__init__(patience)
        self.share, self.floor = share, floor

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "train/student_entropy" not in now:
            return None
        ours, theirs = now["train/student_entropy"], now.get("train/teacher_entropy")
        if ours < self.floor:
            return f"the student's entropy is {ours:.4f} nats per token, below {self.floor:g}"
        if theirs is not None and ours < self.share * theirs:
            return f"the student's entropy is {ours:.4f} nats per token, the teacher's {theirs:.4f} on the same states"
        return ""


class MassDrain(Alarm):
    """A truncated divergence descends the student's own mass on its support. Seen as a negative loss where the loss is a sum of
    divergences, or as student mass on its own top-k (`AgreementMonitor`) that falls against the teacher's on its own.

    At the optimum of the raw top-k reverse KL, p = q / e there, the loss is -m_T / e and the ratio 1 / e (arXiv 2605.11182).

    Args:
        loss: below which the loss is called negative, nats; 0.05 leaves room for a teacher that is renormalised alone.
        share: of the highest ratio of the two masses so far (over three steps, at most 1).
        patience: optimizer steps.
    """

    advice = "close the support (support.closure: tail, or stop_gradient), or compare the full vocabulary"

    def __init__(self, loss: float = -0.05, share: float = 0.7, patience: int = 5) -> None:
        super().__init__(patience)
        self.loss, self.share = loss, share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "train/loss" not in now:
            return None
        if facts.exact and now["train/loss"] < self.loss:
            return f"a sum of divergences has become negative ({now['train/loss']:.3f} nats)"
        ours, theirs = now.get("train/student_top_mass"), now.get("train/teacher_top_mass")
        if ours is None or not theirs:
            return ""
        ratio = fmean([*self.last("ratio", ours / theirs, SETTLE - 1), ours / theirs])
        if ratio < self.share * min(1.0, self.best("best", ratio)):
            return f"the student has {ours:.2f} of its mass on its top-k, the teacher {theirs:.2f} on its own"
        return ""


class OverlapStagnation(Alarm):
    """Student and teacher prefer different tokens, and that does not change: what separates runs that fail from runs that
    succeed is whether the overlap rises (arXiv 2604.13016). Needs `AgreementMonitor`.

    Args:
        steps: of the two halves whose means are compared.
        rise: of the overlap between them, below which it stagnates.
        mass: student mass on the overlap that is enough (0.97 to 0.99 in runs that succeed).
        patience: optimizer steps.
    """

    advice = "begin with a cold start (-c cold_start/auto.yaml), choose other prompts, or another teacher (opd pick-teacher)"

    def __init__(self, steps: int = 50, rise: float = 0.01, mass: float = 0.97, patience: int = 10) -> None:
        super().__init__(patience)
        self.steps, self.rise, self.mass = steps, rise, mass

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "train/overlap" not in now:
            return None
        before = [*self.last("overlap", now["train/overlap"], self.steps), now["train/overlap"]]
        if len(before) <= self.steps or now["train/student_overlap_mass"] >= self.mass:
            return ""
        half = len(before) // 2
        first, second = fmean(before[:half]), fmean(before[half:])
        if second - first >= self.rise:
            return ""
        return f"the top-k overlap went from {first:.3f} to {second:.3f} in {self.steps} steps, at {before[-1]:.3f}"


class TeacherDrift(Alarm):
    """A teacher that follows the student has become another one: its entropy on the student's states is not what it was. A
    sign, not a distance: the divergence from the first teacher would need a third model.

    Args:
        factor: between its entropy now and at the start, either way.
        least: change in nats per token that counts at all.
        patience: optimizer steps.
    """

    advice = "hold it: a smaller EMATeacher.rate, TrustRegionTeacher, a term towards model.reference, or a frozen teacher"

    def __init__(self, factor: float = 2.0, least: float = 0.05, patience: int = 5) -> None:
        super().__init__(patience)
        self.factor, self.least = factor, least

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if not facts.teacher_moves or "train/teacher_entropy" not in now:
            return None
        entropy = now["train/teacher_entropy"]
        before = self.start("entropy", entropy)
        if before is None or abs(entropy - before) < self.least:
            return ""
        apart = abs(math.log(max(entropy, 1e-9) / max(before, 1e-9))) > math.log(self.factor)
        return f"the moving teacher's entropy went from {before:.3f} to {entropy:.3f} nats per token" if apart else ""
