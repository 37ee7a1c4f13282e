"""The methods that ship, as a table: what each of them is, what it descends, and how far its gradient lies from the exact one.

Two measurements stand beside every method. On small worlds all completions are enumerated, so the expected gradient and its
variance are exact. On the bundled addition pair one batch of rollouts is scored, and the gradient in the student's weights is
compared with that of the full-vocabulary reverse KL on the student's own text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lightning import configfiles
from opd_lightning.bars import bar
from opd_lightning.callbacks.pairing import declared_with
from opd_lightning.data import Addition, TaskPrompts
from opd_lightning.inspect.oracle import TabularWorld, Writer, reverse_kl
from opd_lightning.inspect.setups import Setup
from opd_lightning.models import FrozenTeacher, Student
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ClosedFormBaseline, Objective, ReverseKL, SampledToken, Terms, TopK
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold
from opd_lightning.sources import MixtureSource, Source
from opd_lightning.types import Completion, Prompt, Rollout

WORLDS, VOCAB, HORIZON = 4, 5, 3
"""Random worlds that are averaged, their vocabulary (one of it ends the completion) and their horizon."""
PROMPTS = 64
WORLD_K, PAIR_K = 2, 4
"""Top-k sets are cut to these sizes: the worlds have 5 tokens, the pair 21."""
PAIR = ("zoo/addition/student", "zoo/addition/teacher")


@dataclass(frozen=True)
class Method:
    """One configuration below ``methods/``.

    Attributes:
        name: its short name.
        setup: what it trains.
        source: paper, from the header of the file.
    """

    name: str
    setup: Setup
    source: str

    @property
    def objective(self) -> Objective:
        return self.setup.module.objective

    def row(self) -> dict[str, str]:
        """What the catalogue prints."""
        parts = [part for part, _ in self.objective.flat()]
        module = self.setup.module
        target = declared_with(self.objective, module.teacher)
        told = self.setup.data.teacher_template
        return {
            "method": self.name,
            "states": _states(self.setup.rollout.source),
            "divergence": _joined(p.divergence.title for p in parts),
            "support": _joined(p.support.title for p in parts),
            "credit": _joined(p.credit.title for p in parts),
            "route": _joined(p.route.title or "-" for p in parts),
            "teacher": type(module.teacher).__name__ + (f" told by {type(told).__name__}" if told is not None else ""),
            "declared target": target.name if target.defect is None else "none (refused unless allowed)",
            "known bias": target.defect or "; ".join(b for b in target.biases if "order 1 / batch" not in b) or "none",
            "teacher payload": payload(self.objective),
            "source": self.source,
        }


class Measured(NamedTuple):
    """How far a method's expected gradient lies from exact ones, averaged over worlds.

    Attributes:
        token, sequence: ``|g - g_exact| / |g_exact|`` against the token-level and the sequence-level reverse KL.
        token_cosine, sequence_cosine: the directions alone.
        noise: trace of the covariance over the squared length of the expected gradient, for one completion.
        training: cosine in the student's weights with the full-vocabulary reverse KL, on the bundled pair.
    """

    token: float
    sequence: float
    token_cosine: float
    sequence_cosine: float
    noise: float
    training: float


def shipped(read: Callable[[list[str]], Setup]) -> list[Method]:
    """Every method that ships, read without loading weights."""
    files = {name: file for name, file in configfiles.shipped().items() if name.startswith("methods/")}
    shown = bar(files.items(), desc="Reading")
    return [Method(Path(name).stem, read(["-c", name]), _source(file.read_text(encoding="utf-8"))) for name, file in shown]


def _source(header: str) -> str:
    """The first sentence behind ``# Source:``."""
    text = re.sub(r"\n#?\s*", " ", header.partition("# Source:")[2].partition("# Deviations")[0])
    return re.split(r"(?<! al)[.;] ", text + " ")[0].strip(" .;")


def payload(objective: Objective) -> str:
    """Numbers that a teacher elsewhere would have to send for every token."""
    sizes = [_payload(part) for part, _ in objective.flat()]
    return "vocabulary" if None in sizes else str(sum(size or 0 for size in sizes))


def _payload(objective: Objective) -> int | None:
    """The same for one term; None for the whole law."""
    support, credit = objective.support, objective.credit
    if not support.needs_teacher:
        return 0
    if isinstance(support, SampledToken) and support.k:  # everything happens among these
        return 2 * support.k
    if isinstance(objective.baseline, ClosedFormBaseline) or objective.route.title or credit.analytic:
        return None
    if isinstance(support, TopK):
        return 2 * support.k if support.by == "union" else support.k
    return (1 + getattr(objective.baseline, "k", 0)) if support.sampled else None


def measure(method: Method, pair: Bench) -> Measured:
    """Both measurements of a method."""
    sums = [0.0] * 5
    for seed in range(WORLDS):
        world = TabularWorld.random(VOCAB, HORIZON, seed, eos=VOCAB - 1)
        reference = TabularWorld.random(VOCAB, HORIZON, seed + 100, eos=VOCAB - 1).student.detach()
        mean, noise = _expected(world, method, reference)
        exact = [world.gradient(reverse_kl, gamma) for gamma in (0.0, 1.0)]
        row = [_distance(mean, g) for g in exact] + [_cosine(mean, g) for g in exact] + [noise]
        sums = [s + value / WORLDS for s, value in zip(sums, row, strict=True)]
    token, sequence, token_cosine, sequence_cosine, noise = sums
    return Measured(token, sequence, token_cosine, sequence_cosine, noise, pair.cosine(method))


def _expected(world: TabularWorld, method: Method, reference: Tensor) -> tuple[Tensor, float]:
    """Expected gradient and relative noise, each writer weighing as its share of the completions."""
    mean, trace = torch.zeros_like(world.teacher), 0.0
    for writer, share in _writers(method.setup.rollout.source):
        found = world.moments_of(_shrunk(method.objective, WORLD_K), writer, reference=reference, progress=0.5)
        mean, trace = mean + share * found.mean, trace + share * found.trace
    return mean, trace / float(mean.square().sum())


def _shrunk(objective: Objective, k: int) -> Objective:
    """The same with top-k sets that a small vocabulary does not swallow."""
    small = copy.copy(objective)
    if isinstance(objective, Terms):
        small.terms = [copy.copy(term) for term in objective.terms]  # type: ignore[attr-defined]
        for term in small.terms:  # type: ignore[attr-defined]
            term.objective = _shrunk(term.objective, k)
    elif isinstance(objective.support, TopK):
        support = objective.support
        small.support = TopK(min(k, support.k), support.by, support.closure, support.ids)
    elif isinstance(objective.support, SampledToken):
        small.support = SampledToken(min(k, objective.support.k))
    return small


def _writers(source: Source) -> list[tuple[Writer, float]]:
    """Who writes and how much; a data set stands for the teacher."""
    if isinstance(source, MixtureSource):
        share = {True: 0.0, False: 0.0}
        for part, fraction in ((source.first, source.fraction), (source.second, 1.0 - source.fraction)):
            share[part.student_writes] += fraction
        return [(w, s) for w, s in (("student", share[True]), ("teacher", share[False])) if s]  # type: ignore[misc]
    return [("student" if source.student_writes else "teacher", 1.0)]


class Bench:
    """The bundled pair with one batch of prompts, for comparing gradients in the student's weights."""

    def __init__(self) -> None:
        self.module = OPDModule(
            Student(PAIR[0]), FrozenTeacher(PAIR[1]), Objective(ReverseKL()), reference=FrozenTeacher(PAIR[0])
        )
        self.module.configure_model()
        self.module.reference.build(self.module.student or torch.nn.Identity())
        tokenizer = self.module.vocabulary.tokenizer
        rows = TaskPrompts(Addition(), size=PROMPTS, seed=7).rows()
        eos = self.module.vocabulary.eos_ids[0]
        self.prompts = [
            Prompt(
                index=i,
                text=str(row["prompt"]),
                ids=tuple(tokenizer(row["prompt"]).input_ids),
                reference=(*tokenizer(row["completion"], add_special_tokens=False).input_ids, eos),
                row=i,
                fields=dict(row),
            )
            for i, row in enumerate(rows)
        ]
        self.exact = self._gradient(Objective(ReverseKL()), self.student(self.prompts))

    def student(self, prompts: Sequence[Prompt]) -> list[Completion]:
        return self._write(prompts, "student")

    def teacher(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[Completion]:
        return self._write(prompts, "teacher", attempt)

    def grade(self, prompts: Sequence[Prompt], written: Sequence[Completion]) -> list[float]:
        texts = [self.module.vocabulary.decode(c.ids) for c in written]
        return [Addition()(p.fields, text) for p, text in zip(prompts, texts, strict=True)]

    def archive(self) -> None:
        """Nothing is kept."""

    def _write(self, prompts: Sequence[Prompt], who: str, attempt: int = 0) -> list[Completion]:
        seeds = [fold(attempt, "catalogue", p.row) for p in prompts]
        return self.module.write(prompts, who, NativeSampler(max_new_tokens=48), seeds)

    def _gradient(self, objective: Objective, written: list[Completion]) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        self.module.critic = self.module._new_critic() if objective.needs_critic else None
        rollout = Rollout.of(self.prompts, written, self.module.vocabulary.pad_id)
        outcome = torch.tensor(self.grade(self.prompts, written))
        self.module.score(replace(rollout, scale=(), outcome=outcome), objective).loss.backward()
        assert self.module.student is not None
        return torch.cat([p.grad.flatten() for p in self.module.student.parameters() if p.grad is not None])

    def cosine(self, method: Method) -> float:
        """Of a method's gradient with that of the full-vocabulary reverse KL on the student's text."""
        written = method.setup.rollout.source.produce(self.prompts, self)
        return _cosine(self._gradient(_shrunk(method.objective, PAIR_K), written), self.exact)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _joined(titles: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(titles))


def _states(source: Source) -> str:
    if isinstance(source, MixtureSource):
        return f"{source.fraction:g} {_states(source.first)} + {1 - source.fraction:g} {_states(source.second)}"
    return {"StudentSource": "student", "TeacherSource": "teacher", "DatasetSource": "data set"}.get(
        type(source).__name__, type(source).__name__
    )


# ---- printing --------------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += [f"| {' | '.join(row[k].replace('|', '/') for k in keys)} |" for row in rows]
    return "\n".join(lines)


INTRODUCTION = f"""# Methods

Written by `opd configs --methods --measure FILE`. "Data set" text stands for the teacher's in the enumeration.

- **token / sequence**: relative distance of the expected gradient from that of the token-level and of the sequence-level
  reverse KL, and in brackets the cosine: {WORLDS} random worlds of {VOCAB} tokens (one ends the completion) and {HORIZON}
  steps, every completion enumerated in float64. 0 (1) is unbiased. Methods that aim elsewhere (forward KL, other text, other
  targets) are far away by design, and the distance of a mean over a completion's tokens is one of scale.
- **noise**: trace of the gradient's covariance over the squared length of its mean, for one completion.
- **in training**: cosine in the student's weights with the full-vocabulary reverse KL on the student's own text, one batch of
  {PROMPTS} completions of the bundled addition pair.
- Top-k sets are cut to {WORLD_K} tokens in the worlds and {PAIR_K} on the pair, whose vocabularies are small.
- **payload**: numbers that a remote teacher would send per token.

GAE-OPD and CR-OPD are hypotheses of arXiv 2606.22793, which ran no experiment.
"""


def measured_page(methods: list[Method]) -> str:
    """The measurements of all methods as a Markdown page."""
    pair, rows = Bench(), []
    for method in bar(methods, desc="Measuring methods", leave=True):
        found, row = measure(method, pair), method.row()
        rows.append(
            {
                "method": method.name,
                "teacher": row["teacher"],
                "declared target": row["declared target"],
                "token": f"{found.token:.2f} ({found.token_cosine:.2f})",
                "sequence": f"{found.sequence:.2f} ({found.sequence_cosine:.2f})",
                "noise": f"{found.noise:.1f}",
                "in training": f"{found.training:.2f}",
                "payload": row["teacher payload"],
                "known bias": row["known bias"],
                "source": row["source"],
            }
        )
    return f"{INTRODUCTION}\n{markdown(rows)}\n"
