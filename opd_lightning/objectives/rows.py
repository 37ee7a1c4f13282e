"""Everything of an objective that needs the vocabulary, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.objectives.baselines import Baseline
from opd_lightning.objectives.credits import Credit
from opd_lightning.objectives.divergences import Divergence, ReverseKL
from opd_lightning.objectives.gates import Gate
from opd_lightning.objectives.measurements import of_compared, of_drawn, statistics
from opd_lightning.objectives.routes import Route, Vanilla
from opd_lightning.objectives.shapers import Shaper
from opd_lightning.objectives.supports import FullVocab, Scores, Support, World
from opd_lightning.objectives.targets import Target, TeacherLaw
from opd_lightning.ops import logprobs as lp
from opd_lightning.ops.agreement import Tops
from opd_lightning.ops.fused import Scored, score_rows
from opd_lightning.ops.heads import Head
from opd_lightning.ops.reverse_kl import compared, computes
from opd_lightning.types import TOP, TokenLaws, Watch


@runtime_checkable
class Axes(Protocol):
    """What is asked of an `Objective` here."""

    divergence: Divergence
    support: Support
    target: Target
    credit: Credit
    baseline: Baseline
    shaper: Shaper
    route: Route
    gates: list[Gate]
    temperature: float

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def needs_sampler(self) -> bool: ...


@dataclass(frozen=True)
class Extras:
    """What some axes need beside the two models.

    Attributes:
        reference: laws of `model.reference`, for targets that need it.
        critic: (N,) predicted minus future cost of every state, differentiable; for `GAE`.
        progress: share of the run that is done, in [0, 1].
        ahead: (N, V) expected cost of what follows every token of the vocabulary, for look-ahead routes.
        top_ids: (N, K) the student's likeliest tokens when the text was written, for supports that stand on them.
        past: (terms, 2) what `Objective.remember` has kept of earlier steps, for baselines that look back.
        watch: tokens whose likeliest continuations are kept.
        known: how many of the likeliest entries of the teacher's laws are known; None for all.
    """

    reference: TokenLaws | None = None
    critic: Tensor | None = None
    progress: float = 0.0
    ahead: Tensor | None = None
    past: Tensor | None = None
    top_ids: Tensor | None = None
    watch: Watch | None = None
    known: int | None = None


class Parts(NamedTuple):
    """What is left of the vocabulary, per token.

    Attributes:
        direct: (N,) differentiated as it stands; None if there is nothing of the kind.
        logprob: (N,) the student's log-probability of the drawn token; differentiable where the objective samples.
        routed: (N,) log-probability of the route's destination, or None.
        detached: (N,) what credit, gates and routes need.
    """

    direct: Tensor | None
    logprob: Tensor
    routed: Tensor | None
    detached: dict[str, Tensor]


def measure(
    objectives: Sequence[Axes],
    student: TokenLaws,
    teacher: TokenLaws | None,
    tokens: Int[Tensor, " N"],
    agreement_k: int,
    extras: Extras,
    expected: Sequence[Tensor | None] | None = None,
) -> tuple[list[Parts], dict[str, Tensor]]:
    """One pass over the vocabulary for several objectives.

    Args:
        objectives: they share both models' laws and the measurements.
        student: laws at N tokens.
        teacher: the same, or None if no objective needs it.
        tokens: those that were drawn.
        agreement_k: size of the top-k sets whose agreement is measured; 0 leaves it out.
        extras: reference laws and progress.
        expected: per objective, the gradient that its loss gives to each ``direct``, up to one factor; None if unknown.

    Returns:
        What each objective needs, and (N,) statistics of the two models.
    """
    rows = ObjectiveRows(objectives, teacher, extras, tokens, agreement_k)
    head = getattr(student, "head", None)
    if isinstance(head, Head):
        hints = rows.spread(expected) if expected is not None else None
        outputs, measured = score_rows(student.hidden, head, rows, hints)  # type: ignore[attr-defined]
    else:
        others = rows.load(0, len(student), gradient_only=False)
        outputs, measured, _ = rows.measure(student.logits(0, len(student)), others, 0, len(student))
    return rows.collect(outputs, measured)


def exactly(like: Tensor) -> torch.autocast:
    """Inside, products are computed in the precision of their factors, whatever autocast the models run in."""
    return torch.autocast(like.device.type, enabled=False)


class ObjectiveRows:
    """Several objectives as one row-wise loss; implements `opd_lightning.ops.fused.Rows`.

    Its outputs are, objective by objective, those of ``direct``, ``logprob`` and ``routed`` that carry a gradient.
    """

    def __init__(
        self,
        objectives: Sequence[Axes],
        teacher: TokenLaws | None,
        extras: Extras,
        tokens: Int[Tensor, " N"],
        agreement_k: int,
    ) -> None:
        self.objectives, self.teacher, self.reference = objectives, teacher, extras.reference
        self.progress, self.tokens, self.agreement_k = extras.progress, tokens, agreement_k
        self.ahead, self.top_ids, self.watch, self.known = extras.ahead, extras.top_ids, extras.watch, extras.known
        self.matched: Tensor | None = getattr(teacher, "matched", None)  # of a teacher with another vocabulary
        self.seen: dict[int, dict[str, Tensor]] = {}  # of watched tokens, by the block's start
        self.names = [(i, name) for i, o in enumerate(objectives) for name in _differentiated(o)]
        self.measuring = next((i for i, o in enumerate(objectives) if o.needs_teacher), 0)

    def spread(self, expected: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Expected gradients of the outputs, or None where only ``direct`` is known and more is differentiated."""
        if any(expected[i] is None or name != "direct" for i, name in self.names):
            return None
        return [expected[i] for i, _ in self.names]

    def load(self, start: int, stop: int, gradient_only: bool) -> tuple[Tensor, ...]:
        if gradient_only and all(name == "logprob" for _, name in self.names):
            return ()
        others = [] if self.teacher is None else [self.teacher.logits(start, stop)]
        if self.reference is not None:
            others.append(self.reference.logits(start, stop))
        return tuple(others)

    def score(
        self, logits: Tensor, others: Sequence[Tensor], start: int, stop: int, factors: Sequence[Tensor | None] | None
    ) -> Scored:
        with torch.no_grad(), exactly(logits):
            if factors is None:
                return self.measure(logits, others, start, stop)
            if self.names and not others and self.teacher is not None:
                return Scored([], {}, self._of_drawn(logits, start, stop, factors))
            if (closed := self._closed(logits, others, start, stop, factors)) is not None:
                return closed
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            outputs, measured, _ = self.measure(leaf, others, start, stop)
            pairs = [(o, f) for o, f in zip(outputs, factors, strict=True) if f is not None and o.requires_grad]
            if not pairs:
                return Scored([o.detach() for o in outputs], measured, torch.zeros_like(logits))
            (gradient,) = torch.autograd.grad([o for o, _ in pairs], leaf, [f.to(o.dtype) for o, f in pairs])
        return Scored([o.detach() for o in outputs], measured, gradient)

    def measure(self, logits: Tensor, others: Sequence[Tensor], start: int, stop: int) -> Scored:
        tokens = self.tokens[start:stop]
        outputs: dict[tuple[int, str], Tensor] = {}
        measured: dict[Hashable, Tensor] = {}
        for i, objective in enumerate(self.objectives):
            theirs, third = self._others(others, objective)
            ahead, top_ids = (None if x is None else x[start:stop] for x in (self.ahead, self.top_ids))
            given = (third, self.progress, self.measuring == i, self.agreement_k, ahead, top_ids, self.matched, self.known)
            with exactly(logits):
                parts, stats = score(objective, logits, theirs, tokens, *given)
            for name in ("direct", "logprob", "routed"):
                if (value := getattr(parts, name)) is not None:
                    outputs[i, name] = value
            measured[i, "logprob"] = parts.logprob.detach()
            measured |= {(i, "_" + key): value for key, value in parts.detached.items()}
            measured.update(stats)
        self._watch(logits, others, start)
        return Scored([outputs[key] for key in self.names], measured)

    def collect(self, outputs: Sequence[Tensor], measured: dict[Hashable, Tensor]) -> tuple[list[Parts], dict[str, Tensor]]:
        """Outputs and measurements of all tokens, sorted by objective."""
        found = dict(zip(self.names, outputs, strict=True))
        if (0, "_cost") not in measured:  # `_closed` leaves them to us
            measured |= _of_exact_sum(self.objectives[0], found[0, "direct"].detach())
            measured.update(of_drawn(measured[0, "logprob"], measured[0, "_teacher_logprob"]))
        parts = []
        for i in range(len(self.objectives)):
            detached = {k[1][1:]: v for k, v in measured.items() if isinstance(k, tuple) and k[0] == i and k[1] != "logprob"}
            logprob = found.get((i, "logprob"), measured[i, "logprob"])
            parts.append(Parts(found.get((i, "direct")), logprob, found.get((i, "routed")), detached))
        blocks = [self.seen[start] for start in sorted(self.seen)]
        watched = {name: torch.cat([block[name] for block in blocks]) for name in (blocks[0] if blocks else ())}
        return parts, {k: v for k, v in measured.items() if isinstance(k, str)} | watched

    def _others(self, others: Sequence[Tensor], objective: Axes) -> tuple[Tensor | None, Tensor | None]:
        theirs = others[0] if self.teacher is not None and objective.needs_teacher else None
        third = others[-1] if self.reference is not None else None
        return theirs, third

    def _of_drawn(self, logits: Tensor, start: int, stop: int, factors: Sequence[Tensor | None]) -> Float[Tensor, "n V"]:
        """The gradient of log-probabilities of drawn tokens alone: ``c (e_a - p) / T``, for which no other model is asked."""
        total: Tensor | None = None
        for (i, _), factor in zip(self.names, factors, strict=True):
            if factor is None:
                continue
            temperature = self.objectives[i].temperature
            share = lp.log_softmax(logits, temperature).exp_()
            size = (factor.to(share.dtype) / temperature)[:, None]
            term = share.mul_(-size).scatter_add_(-1, self.tokens[start:stop, None], size)
            total = term if total is None else total + term
        return torch.zeros_like(logits) if total is None else total

    def _closed(
        self, logits: Tensor, others: Sequence[Tensor], start: int, stop: int, factors: Sequence[Tensor | None]
    ) -> Scored | None:
        """One exact sum over the vocabulary against the teacher itself, with the divergence's own gradient: no graph.

        What follows from these outputs and measurements is left to `collect`.
        """
        (objective,) = self.objectives if len(self.objectives) == 1 else (None,)
        if objective is None or self.names != [(0, "direct")] or factors[0] is None:
            return None
        if type(objective.support) is not FullVocab or type(objective.target) is not TeacherLaw:
            return None
        tokens = self.tokens[start:stop]
        if type(objective.divergence) is ReverseKL and self.known is None and computes(logits, others[0]):
            self._watch(logits, others, start)
            tops = Tops.of(logits, others[0], self.agreement_k) if self.agreement_k else None  # the gradient takes their place
            found = compared(logits, others[0], tokens, factors[0], objective.temperature, logits, tops is not None)
            drawn: dict[Hashable, Tensor] = {(0, "logprob"): found.logprob, (0, "_teacher_logprob"): found.teacher_logprob}
            return Scored([found.value], drawn | of_compared(found, tops, objective.temperature), found.gradient)
        student = lp.log_softmax(logits, objective.temperature)
        teacher = _fixed(others[0], objective, student.dtype)
        probs = student.exp(), teacher.exp()
        closed = objective.divergence.logit_gradient(student, teacher, *probs)
        if closed is None:
            return None
        value, gradient = closed
        gradient *= (factors[0].to(gradient.dtype) / objective.temperature)[:, None]
        exact = value if type(objective.divergence) is ReverseKL else None
        measured: dict[Hashable, Tensor] = {(0, "logprob"): lp.gather(student, tokens)}
        measured[0, "_teacher_logprob"] = lp.gather(teacher, tokens)
        measured.update(statistics(student, teacher, *probs, tokens, self.agreement_k, exact, self.known))
        self._watch(logits, others, start)
        return Scored([value], measured, gradient)

    @torch.no_grad()
    def _watch(self, logits: Tensor, others: Sequence[Tensor], start: int) -> None:
        """Keep both models' likeliest tokens at those of these tokens that are watched."""
        if self.watch is None:
            return
        objective = self.objectives[self.measuring]
        at, k = self.watch.tokens.to(logits.device) - start, min(self.watch.k, self.known or logits.shape[-1], logits.shape[-1])
        at = at[(at >= 0) & (at < len(logits))]
        laws = {"student": logits, "teacher": self._others(others, objective)[0]}
        found: dict[str, Tensor] = {}
        for who, law in laws.items():
            if law is not None:
                top = lp.log_softmax(law[at].detach(), objective.temperature).topk(k, -1)
                found |= {f"{TOP}{who}_ids": top.indices, f"{TOP}{who}_logprobs": top.values}
        self.seen[start] = found  # once for each block, however often it is computed


def _differentiated(objective: Axes) -> list[str]:
    names = ["direct"] if objective.support.summed else []
    if objective.needs_sampler:
        names.append("logprob")
    if objective.needs_sampler and type(objective.route) is not Vanilla:
        names.append("routed")
    return names


def score(
    objective: Axes,
    student_logits: Float[Tensor, "n V"],
    teacher_logits: Float[Tensor, "n W"] | None,
    tokens: Int[Tensor, " n"],
    reference_logits: Float[Tensor, "n V"] | None = None,
    progress: float = 0.0,
    measuring: bool = True,
    agreement_k: int = 0,
    ahead: Float[Tensor, "n V"] | None = None,
    top_ids: Int[Tensor, "n K"] | None = None,
    matched: Bool[Tensor, " V"] | None = None,
    known: int | None = None,
) -> tuple[Parts, dict[str, Tensor]]:
    """One objective on both models' logits: what it needs of the vocabulary, and statistics if it is the ``measuring`` one."""
    student = lp.log_softmax(student_logits, objective.temperature)
    logprob = lp.gather(student, tokens)
    if teacher_logits is None:
        direct = objective.support.score(objective.divergence, student, None, tokens).direct
        with torch.no_grad():
            detached = dict.fromkeys(("reward", "cost", "state_cost", "teacher_logprob"), torch.zeros_like(logprob))
            detached["student_entropy"] = lp.entropy(student)
        return Parts(direct, logprob, None, detached), {"student_entropy": detached["student_entropy"]} if measuring else {}
    with torch.no_grad():
        teacher = _fixed(teacher_logits, objective, student.dtype)
        third = _fixed(reference_logits, objective, student.dtype) if reference_logits is not None else None
        aim = objective.target.law(student.detach(), teacher, third, progress).clamp(min=lp.floor_of(student.dtype))
    world = objective.support.world(student, aim, tokens)
    recorded: tuple[Tensor | None, ...] = ()
    if objective.support.crosses:
        recorded = (None, matched)
    elif objective.support.record_top_k and top_ids is not None:
        recorded = (top_ids,)
    scores = objective.support.score(objective.divergence, *world[:3], *recorded)
    routed = objective.route.score(world, ahead)
    with torch.no_grad():
        detached = _signals(objective, scores, world) | {"teacher_logprob": lp.gather(aim, tokens)}
        if routed is not None:
            detached["share"] = routed.share
        stats = {}
        if measuring or objective.gates:
            ours, theirs, shares = objective.support.common(student, teacher, matched)
            stats = statistics(ours, theirs, ours.exp(), theirs.exp(), tokens, agreement_k if measuring else 0, None, known)
            if shares:  # the drawn token need not be one of both vocabularies
                stats = {key: value for key, value in stats.items() if key != "leak"} | shares
            else:
                stats |= of_drawn(lp.gather(ours, tokens), lp.gather(theirs, tokens))
        if objective.gates:
            detached |= {k: stats[k] for k in ("student_entropy", "teacher_entropy", "reverse_kl") if k in stats}
    return Parts(scores.direct, logprob, routed.log_destination if routed is not None else None, detached), (
        stats if measuring else {}
    )


def _fixed(logits: Tensor, objective: Axes, dtype: torch.dtype) -> Tensor:
    """The law of a model that does not learn, in the precision of the student's: the two may be loaded differently."""
    return lp.log_softmax(logits.detach(), objective.temperature).to(dtype)


def _signals(objective: Axes, scores: Scores, world: World) -> dict[str, Tensor]:
    """What credit is made of: under ``reward`` the signal of the drawn token, under ``cost`` what it costs others."""
    student, aim, tokens, _ = world
    on_token = lp.gather(student, tokens), lp.gather(aim, tokens)
    out = {"reward": torch.zeros_like(on_token[0])}
    out["cost"] = scores.cost if scores.cost is not None else out["reward"]
    shaper = objective.shaper
    if scores.reward is not None:
        out["reward"] = shaper.shape(scores.reward, *on_token)
        if shaper.title and scores.direct is None:
            out["cost"] = -shaper.shape(-out["cost"], *on_token)
        if (b := objective.baseline.value(objective.divergence, student, aim)) is not None:
            out["reward"] = out["reward"] - b
    out["state_cost"] = torch.zeros_like(out["reward"])
    if objective.credit.analytic:
        out["state_cost"] = _state_cost(objective, scores, student, aim)
    return out


def _of_exact_sum(objective: Axes, value: Tensor) -> dict[Hashable, Tensor]:
    """`_signals` of a divergence that is summed over the vocabulary against the teacher itself."""
    none = torch.zeros_like(value)
    return {(0, "_reward"): none, (0, "_cost"): value, (0, "_state_cost"): value if objective.credit.analytic else none}


def _state_cost(objective: Axes, scores: Scores, student: Tensor, aim: Tensor) -> Tensor:
    """The mean over tokens of what is under ``cost``."""
    if scores.direct is not None and not objective.support.sampled:
        return scores.direct.detach()
    divergence, shaper = objective.divergence, objective.shaper
    if shaper.title and scores.direct is None:
        return -(student.exp() * shaper.shape(-divergence.value(student, aim), student, aim)).sum(-1)
    return divergence.total(student, aim)
