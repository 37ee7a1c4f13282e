"""From figures to a verdict: will on-policy distillation of this pair on these prompts work as it is?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opd_lightning.callbacks import Readiness
from opd_lightning.inspect.examination import Figures

GO, COLD_START, PROMPTS, REFUSE = "go", "cold-start first", "choose other prompts", "refuse"
ORDER = (GO, COLD_START, PROMPTS, REFUSE)
"""From best to worst."""
ENTRY = {name: enter for name, (enter, _) in Readiness().limits.items()}
"""What a cold start by itself (`ColdStart.until`) begins at."""


@dataclass(frozen=True)
class Thresholds:
    """Where a figure becomes a finding. Every one is a flag of ``opd doctor``.

    Args:
        min_mass: student's overlap mass below which a cold start comes first. Between a pair that learned at once (0.85) and
            one whose student wrote in another pattern and did not (0.78), in a toy after section 3.1 of "Rethinking On-Policy
            Distillation" (arXiv 2604.13016); the paper's own runs that succeed lie at 0.97 and above, its base model at 0.55.
        max_kl: reverse KL in nats per token above which a cold start comes first; the same two pairs had 0.49 and 3.26, and
            this is the middle on a logarithmic scale. Where a tenth of the student's completions lie below it, neither figure
            asks for a cold start: such pairs (mass 0.74, 3.1 nats, one text in four near) learned at once (`opd reproduce D1`).
        min_ahead: the teacher must be ahead of the student by this much accuracy, alone or when it goes on from the student's
            text. Larger teachers of the same recipe were ahead by less than what the student could learn (sections 3.1, 3.2).
        min_kl: without a grader, a teacher nearer than this (nats per token) teaches nothing; a fiftieth of
            what the bundled pair begins with.
        max_truncated: share of completions that the length limit may cut: beyond it most rows never show their end.
        min_end: probability that the teacher must give to an end where the student ended. A pair that shares its end has 0.9
            and more, one that does not has 0.
        max_floor: share of the divergence that no student can lose, because the teacher is told what the student is not. A toy
            with information of its own for every row kept 96 % of it (arXiv 2605.11182; `opd pi-floor`).
        rollouts_per_nat: completions that a cold start takes for every nat of reverse KL: 5120 took the toy from 3.3 to 0.46.
    """

    min_mass: float = ENTRY["mass"]
    max_kl: float = ENTRY["reverse_kl"]
    min_ahead: float = 0.05
    min_kl: float = 0.005
    max_truncated: float = ENTRY["truncated"]
    min_end: float = ENTRY["ends"]
    max_floor: float = 0.5
    rollouts_per_nat: float = 1800.0


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
        word: one of `ORDER`.
        reasons: why, worst first; a finding says which key to change.
        steps: optimizer steps of the cold start, about; 0 for another verdict.
    """

    word: str
    reasons: tuple[str, ...]
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.word} (about {self.steps} steps)" if self.steps else self.word


def judge(figures: Figures, static: Sequence[str], batch_size: int, at: Thresholds = Thresholds()) -> Verdict:
    """The verdict with its reasons.

    Args:
        figures: measured.
        static: what differs in end tokens, templates and thinking mode, a line each, as `inspect.pairs` finds it.
        batch_size: rollouts of a step, for the length of the cold start.
        at: thresholds.
    """
    found = [*_static(static, figures, at), *_ends(figures, at), *_worth(figures, at), *_near(figures, at)]
    word = max((word for word, _ in found), key=ORDER.index, default=GO)
    found.sort(key=lambda finding: -ORDER.index(finding[0]))
    steps = round(at.rollouts_per_nat * figures.reverse_kl / batch_size + 0.5) if word == COLD_START else 0
    reasons = [reason for _, reason in found]
    return Verdict(word, tuple(reasons or [_good(figures)]), steps)


def _good(f: Figures) -> str:
    ahead = "the teacher has something to teach"
    if f.graded and f.teacher is not None and f.teacher.accuracy is not None and f.student.accuracy is not None:
        ahead = f"the teacher is ahead by {f.teacher.accuracy - f.student.accuracy:.0%} accuracy"
    return f"{ahead}, and knows the student's text ({f.mass[0]:.0%} of the student's probability is on shared tokens)"


def _static(lines: Sequence[str], f: Figures, at: Thresholds) -> Iterator[tuple[str, str]]:
    shared_end = f.ends is not None and f.ends[1] >= at.min_end
    for line in lines:
        if line.startswith("thinking mode"):
            yield REFUSE, f"{line}: set the same options in data.template and data.teacher_template"
        elif line.startswith("EOS"):
            yield (GO if shared_end else REFUSE), f"{line}: model.student.path and model.teacher.path need one end token"
        else:
            yield GO, line


def _ends(f: Figures, at: Thresholds) -> Iterator[tuple[str, str]]:
    if f.ends is not None and f.ends[1] < at.min_end:
        yield (
            REFUSE,
            f"where the student ends, the teacher gives an end {f.ends[1]:.2f} probability (the student {f.ends[0]:.2f}): the "
            "student would unlearn to end. Use a teacher with the same end token (opd inspect-pair)",
        )
    if f.student.truncated > at.max_truncated:
        limit = "the teacher's as well" if f.teacher and f.teacher.truncated > at.max_truncated else "the teacher's are not"
        yield (
            REFUSE if limit.endswith("well") else COLD_START,
            f"{f.student.truncated:.0%} of the student's completions are cut by the length limit, {limit}: raise "
            "rollout.sampler.max_new_tokens, or teach the student to end first",
        )
    elif f.teacher is not None and f.teacher.truncated > at.max_truncated:
        yield (
            REFUSE,
            f"{f.teacher.truncated:.0%} of the teacher's completions do not end within rollout.sampler.max_new_tokens: it has "
            "another end token or template, or needs more room",
        )


def _worth(f: Figures, at: Thresholds) -> Iterator[tuple[str, str]]:
    if f.floor is not None and f.floor > at.max_floor * f.reverse_kl:
        yield (
            REFUSE,
            f"{f.floor:.3f} of {f.reverse_kl:.3f} nats per token cannot be learned: the teacher is told what the student "
            "cannot know (data.teacher_template). Tell it one rule for all rows, or less",
        )
    if f.teacher is None or f.student.accuracy is None or f.teacher.accuracy is None:
        if f.reverse_kl < at.min_kl:
            yield REFUSE, f"the two laws are the same to within {f.reverse_kl:.4f} nats per token: nothing is left to learn"
        return
    ours, theirs = f.student.accuracy, f.teacher.accuracy
    if theirs - ours >= at.min_ahead:
        return
    said = f"accuracy {theirs:.0%} of the teacher, {ours:.0%} of the student"
    if ours > 1.0 - at.min_ahead:
        yield PROMPTS, f"{said}: the student can do these prompts already. Take harder ones (data.prompts, ByDifficulty)"
    elif theirs < at.min_ahead:
        yield (
            PROMPTS,
            f"{said}: the teacher cannot do these prompts as they are rendered. Take its own prompts and template "
            "(data.prompts, data.template)",
        )
    else:
        gain = max(f.gain.values(), default=0.0)
        more = f"; going on from the student's text it gains {gain:+.0%}" if f.gain else ""
        yield REFUSE, f"{said}{more}: this teacher knows nothing new here. Take another one (opd pick-teacher), or its template"


def _near(f: Figures, at: Thresholds) -> Iterator[tuple[str, str]]:
    how = "its text is another pattern than the teacher's. Cold-start first (-c cold_start/auto.yaml)"
    word = COLD_START
    if f.nearest_kl <= at.max_kl:  # the student writes the teacher's way at times, and training makes it more frequent
        word = GO
        how = f"but a tenth of the student's texts are within {f.nearest_kl:.2f} nats per token, which is enough to begin from"
    if f.mass[0] < at.min_mass:
        yield word, f"only {f.mass[0]:.0%} of the student's probability is on tokens that the teacher prefers too: {how}"
    if f.reverse_kl > at.max_kl:
        yield word, f"{f.reverse_kl:.2f} nats per token between student and teacher: {how}"
