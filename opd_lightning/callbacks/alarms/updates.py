"""Alarms over what a step is made of."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from opd_lightning.callbacks.alarms.alarm import Alarm, Facts


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
