"""Alarms over what the student writes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from opd_lightning.callbacks.alarms.alarm import SETTLE, Alarm, Facts


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


class PILeak(Alarm):
    """Completions hold more and more of what only the teacher was told about their prompt (`Leak`), beyond what is there by
    chance: the student recites its teacher's information. Where the information is the answer itself, a student that becomes
    right rings too.

    Args:
        rise: of the share of 3-grams, its control taken off, since the start.
        patience: refreshes.
    """

    advice = "read the completions: if they cite what the student never saw, tell the teacher a rule (see `opd pi-floor -c`)"

    def __init__(self, rise: float = 0.25, patience: int = 3) -> None:
        super().__init__(patience)
        self.rise = rise

    def symptom(self, now: Mapping[str, float], facts: Facts) -> str | None:
        if "rollout/leak" not in now:
            return None
        leak = now["rollout/leak"] - now.get("rollout/leak_control", 0.0)
        before = self.start("leak", leak)
        if before is None or leak < before + self.rise:
            return ""
        share = f"{leak:.0%} of a completion's 3-grams ({max(before, 0.0):.0%} before)"
        return f"{share}, beyond chance, are what only the teacher was told"
