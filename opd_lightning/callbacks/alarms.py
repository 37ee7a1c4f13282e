"""Alarms: what can go wrong with a run, each with the next thing to do.

They read what was logged at the end of an optimizer step and never run a model. Where no source stands beside a threshold it is
our choice, set so that the healthy runs of the tests and of the quickstart stay silent.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import ClassVar

from opd_lightning.configurable import Configurable

__all__ = [
    "Alarm",
    "EOSLoss",
    "EntropyCollapse",
    "Facts",
    "GradientSpike",
    "LengthCollapse",
    "LengthExplosion",
    "MassDrain",
    "OverlapStagnation",
    "RepetitionLoop",
    "SignalOutliers",
    "StaleRollouts",
    "TeacherDrift",
]

SETTLE = 3
"""Measurements whose mean is "the start" that later ones are compared with."""


@dataclass(frozen=True)
class Facts:
    """What an alarm may ask about the run beside its numbers."""

    exact: bool
    """The loss is a sum of divergences, without a signal of drawn tokens, so that it cannot be negative."""
    teacher_moves: bool
    """The teacher follows the student."""


class Alarm(Configurable, ABC):
    """Something that can go wrong; ``advice`` says what to do next.

    Args:
        patience: measurements in a row with the symptom before it rings; then it is silent until the symptom was gone.

    Raises:
        ValueError: for a patience below 1.
    """

    advice: ClassVar[str]

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"{type(self).__name__}(patience={patience}): must be at least 1")
        self.patience = patience
        self.reset()

    @property
    def name(self) -> str:
        """As in the key ``alarm/name``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def reset(self) -> None:
        """Forget what was seen: another phase begins."""
        self.count = 0
        self.memory: dict[str, list[float]] = {}

    @abstractmethod
    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        """What is wrong at this optimizer step; empty for nothing, None if nothing was measured.

        Args:
            now: what this step has logged, all ranks together.
            facts: of the run.
        """

    def watch(self, now: Mapping[str, float], facts: Facts) -> str:
        """What is wrong, at the step where it rings; else empty."""
        found = self.symptom(now, facts)
        if found is None:
            return ""
        self.count = self.count + 1 if found else 0
        return found if self.count == self.patience else ""

    def start(self, key: str, value: float) -> float | None:
        """Mean of the first `SETTLE` values under this key; None while they are collected."""
        first = self.memory.setdefault(key, [])
        if len(first) < SETTLE:
            first.append(value)
            return None
        return fmean(first)

    def best(self, key: str, value: float) -> float:
        """The highest value so far, this one included."""
        self.memory[key] = [max([value, *self.memory.get(key, [])])]
        return self.memory[key][0]

    def last(self, key: str, value: float, number: int) -> list[float]:
        """The values before this one, at most ``number``, oldest first."""
        before = self.memory.get(key, [])
        self.memory[key] = [*before, value][-number:]
        return before


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


class LengthExplosion(Alarm):
    """Completions grow, and more of them are cut: not longer answers, but answers without an end.

    Args:
        factor: of the mean length at the start.
        cut: by how much the truncated share must have risen.
        patience: refreshes.
    """

    advice = "bound the signal (model.objective.shaper: Clip), or add a term towards model.reference"

    def __init__(self, factor: float = 1.5, cut: float = 0.2, patience: int = 3) -> None:
        super().__init__(patience)
        self.factor, self.cut = factor, cut

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "rollout/completion_tokens" not in now:
            return None
        length, cut = now["rollout/completion_tokens"], now["rollout/truncated"]
        before, cut_before = self.start("length", length), self.start("cut", cut)
        if before is None or cut_before is None or length < self.factor * before or cut < cut_before + self.cut:
            return ""
        return f"completions grew from {before:.0f} to {length:.0f} tokens, and {cut:.0%} are cut ({cut_before:.0%} before)"


class LengthCollapse(Alarm):
    """Completions shrink to a stub, counted from when most of them ended by themselves.

    Args:
        share: of the mean length then.
        patience: refreshes.
    """

    advice = "look at the completions: the teacher's context may give the answer away, or EOS is scored where it should not be"

    def __init__(self, share: float = 0.33, patience: int = 3) -> None:
        super().__init__(patience)
        self.share = share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "rollout/completion_tokens" not in now:
            return None
        length = now["rollout/completion_tokens"]
        if "length" not in self.memory and now["rollout/truncated"] > 0.5:
            return ""
        before = self.start("length", length)
        if before is None or length >= self.share * before:
            return ""
        return f"completions shrank from {before:.1f} to {length:.1f} tokens"


class EOSLoss(Alarm):
    """The student forgets how to end: the share of completions with an end falls to a part of what it was. A run that cuts
    most completions from the first on (prefixes, on purpose) has nothing to lose.

    Args:
        share: of the highest rate of ended completions so far, both over three refreshes.
        patience: refreshes.
    """

    advice = "compare the EOS tokens of both models (`opd inspect-pair`), score EOS (no SpecialTokens gate), cold-start first"

    def __init__(self, share: float = 0.5, patience: int = 3) -> None:
        super().__init__(patience)
        self.share = share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "rollout/truncated" not in now:
            return None
        ended = 1.0 - now["rollout/truncated"]
        ended = fmean([*self.last("ended", ended, SETTLE - 1), ended])
        best = self.best("best", ended)
        lost = best > 0.5 and ended < self.share * best
        return f"{ended:.0%} of the completions end by themselves, {best:.0%} did" if lost else ""


class RepetitionLoop(Alarm):
    """Of what was new in a completion at the start, more than a share repeats itself now (3-grams). Reasoning models begin at
    0.51 and go through 0.79 to 0.998 when they collapse (arXiv 2605.11182, figure 4).

    Args:
        share: of the 3-grams that were no repetition at the start.
        patience: refreshes.
    """

    advice = "close the support, lower the learning rate, or stop earlier: a low KL on repeated text is no success"

    def __init__(self, share: float = 0.5, patience: int = 3) -> None:
        super().__init__(patience)
        self.share = share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "rollout/repetition" not in now:
            return None
        again = now["rollout/repetition"]
        before = self.start("again", again)
        if before is None or again <= before + self.share * (1.0 - before):
            return ""
        return f"{again:.0%} of a completion's 3-grams repeat earlier ones, {before:.0%} did at the start"


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


class GradientSpike(Alarm):
    """The gradient's norm is a multiple of what it was in the steps before.

    Args:
        factor: of their median, or of 0.2 where that is less: smaller norms are no danger.
        steps: looked back on; half of them must be known.
        patience: optimizer steps.
    """

    advice = "clip gradients (trainer.gradient_clip_val), lower the learning rate, or look at the rollouts of this step"

    def __init__(self, factor: float = 5.0, steps: int = 20, patience: int = 1) -> None:
        super().__init__(patience)
        self.factor, self.steps = factor, steps

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "train/gradient_norm" not in now:
            return None
        norm = now["train/gradient_norm"]
        before = self.last("norm", norm, self.steps)
        if 2 * len(before) < self.steps or norm <= self.factor * max(median(before), 0.2):
            return ""
        return f"the gradient's norm is {norm:.3g}, its median over the last {len(before)} steps {median(before):.3g}"


class SignalOutliers(Alarm):
    """Some drawn tokens have a signal beyond every bound (``train/signal_outliers``): a few of them make the gradient.

    Args:
        share: of the drawn tokens; 0.01 means that the 99th percentile is an outlier.
        patience: optimizer steps.
    """

    advice = "bound the signal (model.objective.shaper: Clip), use GeneralizedJSD, or compare both models' special tokens"

    def __init__(self, share: float = 0.01, patience: int = 5) -> None:
        super().__init__(patience)
        self.share = share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        found = now.get("train/signal_outliers")
        if found is None:
            return None
        return f"{found:.1%} of the drawn tokens have a signal beyond 10 nats" if found > self.share else ""


class StaleRollouts(Alarm):
    """The student has moved away from the one that wrote: importance ratios vary so much that tokens are lost.

    Args:
        share: effective sample size, of the drawn tokens. The ratio of a whole completion varies far more than that of a token.
        patience: optimizer steps.
    """

    advice = "refresh more often (rollout.every_n_steps, rollout.passes), lower the learning rate, or use PPOClip"

    def __init__(self, share: float = 0.9, patience: int = 2) -> None:
        super().__init__(patience)
        self.share = share

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        size, age = now.get("train/effective_sample"), now.get("train/staleness")
        if size is None or age is None:  # text of the teacher or of a data set has no age
            return None
        if size >= self.share:
            return ""
        when = f"written {age:.1f} steps ago" if age else "though they are fresh (dropout, top_p or the precision differ)"
        return f"the effective sample is {size:.2f} of the tokens, {when}"


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
