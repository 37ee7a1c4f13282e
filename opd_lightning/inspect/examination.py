"""What two models make of the same prompts: the figures that `opd doctor` judges by, measured without any training.

The student writes, both models score every token of it; the teacher writes too, and goes on from cut texts of the student.
Overlap, its mass and advantage are equations 6, 7, 9 and 10 of "Rethinking On-Policy Distillation" (arXiv 2604.13016), the
continuation gain is its probe of section 6; all of them are independent of the objective in use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.bars import bar
from opd_lightning.callbacks.pairing import refuse_incomparable
from opd_lightning.callbacks.readiness import nearest
from opd_lightning.inspect.setups import Setup
from opd_lightning.inspect.tellings import floor_at
from opd_lightning.models.distributions import evaluating, laws_of, pack_rows
from opd_lightning.models.teachers import Teacher
from opd_lightning.ops import logprobs as lp
from opd_lightning.ops.agreement import agreement
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt, Rollout, TokenLaws

TILE = 256
"""Laws that exist at once."""
SHARES = (0.25, 0.5, 0.75)
"""How much of its text is left to the student before the teacher goes on."""
BINS = 6
"""Stretches of the completion in which divergence and entropy are shown."""
MOVED = 0.1
"""Total variation from which on a state counts as headroom: a tenth of what is written there should be something else."""
TELLINGS = 4
"""What the teacher is told about a row and about three others, for the floor."""


@dataclass(frozen=True)
class Voice:
    """What one model writes.

    Attributes:
        accuracy: mean score under the data's grader; None without one.
        tokens: mean length of a completion.
        truncated: share that ran into the length limit.
    """

    accuracy: float | None
    tokens: float
    truncated: float


@dataclass(frozen=True)
class Stretch:
    """Means over positions ``first`` to ``last`` of the student's completions (nats; overlap in [0, 1])."""

    first: int
    last: int
    tokens: int
    reverse_kl: float
    student_entropy: float
    teacher_entropy: float
    overlap: float


@dataclass(frozen=True)
class Figures:
    """Everything that was measured; pairs are (student, teacher), nats are per token of the student's text.

    Attributes:
        prompts, completions: how many.
        k: size of the top-k sets.
        student, teacher: what each writes; the teacher's is None if it only scores.
        overlap: share of the student's top-k tokens among the teacher's.
        mass: probability of each law on the shared ones.
        advantage: of the shared ones, never positive.
        reverse_kl: KL(student ‖ teacher).
        nearest_kl: the same of the nearest tenth of the student's completions: the largest mean over tokens among them. Where
            it is small, some of the text is the teacher's way already, and training can begin from there.
        entropy: of both laws.
        likelihood: log-probability that each gives to the student's text.
        headroom: share of states where at least a tenth of the student's probability should go elsewhere (total variation).
        ends: probability of an end token where the student ended; None if it never ended.
        stretches: by position.
        gain: share of the student's text that is kept -> what is gained if the teacher goes on from there: accuracy over the
            student's own completion, or, without a grader, nats per token under the teacher.
        floor: reverse KL that no student can go below, because the teacher is told what the student is not; None where the
            teacher is told nothing, or only after the group has written.
        parameters: of both networks; 0 for a teacher without one of its own.
    """

    prompts: int
    completions: int
    k: int
    student: Voice
    teacher: Voice | None
    overlap: float
    mass: tuple[float, float]
    advantage: float
    reverse_kl: float
    nearest_kl: float
    entropy: tuple[float, float]
    likelihood: tuple[float, float]
    headroom: float
    ends: tuple[float, float] | None
    stretches: tuple[Stretch, ...]
    gain: dict[str, float]
    floor: float | None
    parameters: tuple[int, int]

    @property
    def graded(self) -> bool:
        """Whether accuracies were measured."""
        return self.student.accuracy is not None


class Examination:
    """Both models of a run, built once and asked without a trainer.

    Args:
        setup: the run.
        prompts: how many of its training prompts.
        samples: completions of each.
        k: size of the top-k sets; 0 takes 16, or a fifth of a small vocabulary: near the whole of it the overlap says nothing.

    Raises:
        ValueError: for a teacher that cannot be asked or has a tokenizer of its own, or numbers below 1.
    """

    def __init__(
        self,
        setup: Setup,
        prompts: int = 16,
        samples: int = 4,
        k: int = 0,
    ) -> None:
        if min(prompts, samples) < 1 or k < 0:
            raise ValueError(f"--prompts {prompts} --samples {samples} --k {k}: the first two at least 1, the last at least 0")
        self.setup = setup
        self.module, self.data, self.sampler = setup.module, setup.data, setup.rollout.sampler
        if not self.module.teacher.answers:
            raise ValueError(f"{self.module.teacher!r} has no network to examine: choose another model.teacher")
        refuse_incomparable(self.module.teacher, "the examination")
        self.samples, self.seed = samples, setup.rollout.seed
        self.k = k or max(1, min(16, self.module.vocabulary.size // 5))
        self.data.vocabulary = self.module.vocabulary
        some = self.data.some_prompts(prompts)
        self.prompts = [replace(p, row=i * samples + s) for i, p in enumerate(some) for s in range(samples)]
        self.grader = self.data.prompt_set.grader()

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def network(self) -> nn.Module:
        """The student; building it builds the teacher."""
        self.module.configure_model()
        self.module.to(self.device)
        self.module._place_teacher()
        assert self.module.student is not None
        return self.module.student

    def ask(self, teacher: Teacher) -> None:
        """Another teacher from now on; what the student has written stays.

        Raises:
            VocabularyMismatch: if it does not share the student's tokens.
        """
        network = self.network
        teacher.check(self.module.recipe)
        self.module.teacher = teacher
        self.module.prove_vocabularies()
        for leaf in teacher.leaves().values():
            leaf.build(network)
            if (own := leaf.own_model()) is not None and self.module.packed:
                pack_rows(own)
        self.module._place_teacher()

    # ---- writing -------------------------------------------------------------------------------------------------------
    def write(self, who: str, prompts: Sequence[Prompt], purpose: str) -> list[Completion]:
        """Completions of ``student`` or ``teacher`` behind the prompts, with a progress bar."""
        assert self.network is not None
        seeds = [fold(self.seed, "doctor", purpose, p.row) for p in prompts]
        with bar(total=len(prompts), desc=f"{who} writes ({purpose})") as shown:
            return self.module.write(prompts, who, self.sampler, seeds, lambda done: _advance(shown, done))

    @cached_property
    def written(self) -> list[Completion]:
        """The student's completions."""
        return self.write("student", self.prompts, "own text")

    @cached_property
    def told(self) -> list[Prompt]:
        """The prompts with what the teacher is told, its group's texts included."""
        return self.data.inform(self.prompts, self.written, self.samples)

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[int]], ended: Sequence[bool]) -> list[float]:
        """The grader's verdicts."""
        assert self.grader is not None
        decode = self.module.vocabulary.decode
        return [self.grader({**p.fields, "ended": e}, decode(list(t))) for p, t, e in zip(prompts, texts, ended, strict=True)]

    def voice(self, prompts: Sequence[Prompt], written: Sequence[Completion]) -> Voice:
        """Accuracy, length and truncation of completions."""
        graded = None
        if self.grader is not None:
            graded = _mean(self.scores(prompts, [c.ids for c in written], [c.ended for c in written]))
        return Voice(graded, _mean([len(c.ids) for c in written]), _mean([not c.ended for c in written]))

    # ---- scoring -------------------------------------------------------------------------------------------------------
    def rollout(self) -> Rollout:
        """The student's completions behind both prompts."""
        return self.module.join(self.told, self.written)

    def laws(self, rollout: Rollout) -> tuple[TokenLaws, TokenLaws]:
        """Both models' laws at the completion tokens."""
        size = self.module.vocabulary.size
        return laws_of(self.network, rollout.text, size), self.module.teacher.laws(self.network, rollout.for_teacher, size)

    def per_token(self) -> dict[str, Tensor]:
        """What is measured at every token of the student's text, (N,) each."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for rollout in self._batches():
            tokens = rollout.text.targets[rollout.mask]
            closing = torch.isin(tokens, torch.tensor(self.module.vocabulary.eos_ids, device=tokens.device))
            found["position"].append((rollout.mask.cumsum(1) - 1)[rollout.mask].cpu())
            found["closing"].append(closing.cpu())
            for student, teacher, at in tiles(self.laws(rollout)):
                for name, value in self._measured(student, teacher, tokens[at]).items():
                    found[name].append(value.cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _batches(self) -> Iterator[Rollout]:
        size = self.data.micro_batch_size or 16
        rollout = self.rollout()
        with torch.no_grad(), evaluating(self.network):
            for rows in bar(torch.arange(len(rollout)).split(size), desc="both score"):
                yield rollout.select(rows).to(self.device)

    def _measured(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        shared = agreement(student, teacher, self.k)
        ends = list(self.module.vocabulary.eos_ids)
        p, q = student.exp(), teacher.exp()
        return {
            "overlap": shared.overlap,
            "student_mass": shared.student_mass,
            "teacher_mass": shared.teacher_mass,
            "advantage": shared.advantage,
            "reverse_kl": torch.linalg.vecdot(p, student - teacher),
            "student_entropy": lp.entropy(student),
            "teacher_entropy": lp.entropy(teacher),
            "moved": 0.5 * (p - q).abs().sum(-1),
            "student_likelihood": lp.gather(student, tokens),
            "teacher_likelihood": lp.gather(teacher, tokens),
            "student_end": p[:, ends].sum(-1),
            "teacher_end": q[:, ends].sum(-1),
        }

    # ---- probes ----------------------------------------------------------------------------------------------------------
    def gain(self, own: float | None, likelihood: Tensor) -> dict[str, float]:
        """What is gained if the teacher goes on from the student's text, cut at several depths (see `Figures.gain`).

        Args:
            own: accuracy of the student's own completions; None without a grader.
            likelihood: (N,) the teacher's log-probability of every token of the student's text.
        """
        out = {}
        of_row = likelihood.split([len(c.ids) for c in self.written])
        for share in SHARES:
            cuts = [int(share * len(c.ids)) for c in self.written]
            rows = [i for i, (cut, c) in enumerate(zip(cuts, self.written, strict=True)) if 0 < cut < len(c.ids)]
            if not rows:
                continue
            begun = [_behind(self.told[i], self.written[i].ids[: cuts[i]]) for i in rows]
            further = self.write("teacher", begun, f"goes on from {share:.0%}")
            if own is not None:
                texts = [(*self.written[i].ids[: cuts[i]], *c.ids) for i, c in zip(rows, further, strict=True)]
                alone = self.scores([self.told[i] for i in rows], *_texts([self.written[i] for i in rows]))
                both = self.scores([self.told[i] for i in rows], texts, [c.ended for c in further])
                out[f"{share:.0%}"] = _mean(both) - _mean(alone)
            else:
                theirs = torch.tensor([x for c in further for x in c.logprobs])
                ours = torch.cat([of_row[i][cuts[i] :] for i in rows])
                out[f"{share:.0%}"] = float(theirs.mean() - ours.mean())
        return out

    def floor(self) -> float | None:
        """Reverse KL that no student can go below which is not told what the teacher is (`opd_lightning.inspect.tellings`), in
        nats a token; None where nothing is told, or only what the group has written, or there is one row alone.
        """
        some = {p.index: (p, c) for p, c in zip(self.prompts, self.written, strict=True) if p.informed}
        if self.data.teacher_template is None or self.data.gathers or len(some) < 2:
            return None
        prompts, written = zip(*some.values(), strict=True)
        return floor_at(self.setup, prompts, written, TELLINGS, "reverse").floor

    # ---- all of it -----------------------------------------------------------------------------------------------------
    def figures(self) -> Figures:
        """Measure everything."""
        student = self.voice(self.prompts, self.written)
        found = self.per_token()
        teacher, gain = None, {}
        if self.module.teacher.writes:
            teacher = self.voice(self.told, self.write("teacher", self.told, "own text"))
            gain = self.gain(student.accuracy, found["teacher_likelihood"])
        mean = {name: float(value.double().mean()) for name, value in found.items()}
        lengths = [len(c.ids) for c in self.written]
        closing = found["closing"]
        ends = None
        if bool(closing.any()):
            ends = (float(found["student_end"][closing].mean()), float(found["teacher_end"][closing].mean()))
        return Figures(
            prompts=len({p.index for p in self.prompts}),
            completions=len(self.prompts),
            k=self.k,
            student=student,
            teacher=teacher,
            overlap=mean["overlap"],
            mass=(mean["student_mass"], mean["teacher_mass"]),
            advantage=mean["advantage"],
            reverse_kl=mean["reverse_kl"],
            nearest_kl=nearest([float(part.double().mean()) for part in found["reverse_kl"].split(lengths) if len(part)]),
            entropy=(mean["student_entropy"], mean["teacher_entropy"]),
            likelihood=(mean["student_likelihood"], mean["teacher_likelihood"]),
            headroom=float((found["moved"] >= MOVED).double().mean()),
            ends=ends,
            stretches=tuple(stretches(found)),
            gain=gain,
            floor=self.floor(),
            parameters=self.parameters(),
        )

    def parameters(self) -> tuple[int, int]:
        """Parameters of both networks."""
        own = [leaf.own_model() for leaf in self.module.teacher.leaves().values()]
        return _count(self.network), sum(_count(m) for m in own if m is not None)


def tiles(laws: Sequence[TokenLaws]) -> Iterator[tuple[Any, ...]]:
    """Log-probabilities of several models at the same tokens, `TILE` tokens at a time, and which tokens they are."""
    for start in range(0, len(laws[0]), TILE):
        stop = min(start + TILE, len(laws[0]))
        yield (*(lp.log_softmax(law.logits(start, stop)) for law in laws), slice(start, stop))


def stretches(found: dict[str, Tensor]) -> Iterator[Stretch]:
    """Means over equal stretches of positions; empty ones are left out."""
    position = found["position"]
    width = max(1, -(-(int(position.max()) + 1) // BINS))
    for first in range(0, int(position.max()) + 1, width):
        here = (position >= first) & (position < first + width)
        if bool(here.any()):
            names = ("reverse_kl", "student_entropy", "teacher_entropy", "overlap")
            yield Stretch(first, first + width - 1, int(here.sum()), *(float(found[n][here].mean()) for n in names))


def _texts(written: Sequence[Completion]) -> tuple[list[tuple[int, ...]], list[bool]]:
    return [c.ids for c in written], [c.ended for c in written]


def _behind(prompt: Prompt, begun: Sequence[int]) -> Prompt:
    """The prompt with the beginning of a completion behind it."""
    theirs = (*prompt.teacher_ids, *begun) if prompt.teacher_ids is not None else None
    return replace(prompt, ids=(*prompt.ids, *begun), teacher_ids=theirs)


def _advance(shown: Any, done: int) -> None:
    shown.update(done - shown.n)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
