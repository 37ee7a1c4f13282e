"""Where two laws are compared: which vocabulary entries, and what closes a truncated sum.

A support is a quadrature rule. Exact supports sum over entries and are differentiated through; the sampled token stands
for the whole sum with a score-function weight. Both give `Scores`, and nothing later sees the vocabulary.

The closures of a truncated reverse KL differ by one constant b in the gradient ``sum_S p_v (d_v - b) grad log p_v`` (S
the support, d = log p - log q, m and m_T the student's and the teacher's mass on S):

==============  =====================  ==========================================================================
closure         b                      what it does
==============  =====================  ==========================================================================
tail            log (1-m)/(1-m_T)      exact divergence of the (K+1)-way coarsening: a lower bound of the full one
renormalize     mean of d on S         exact divergence of the two laws restricted to S: blind to the mass outside
stop_gradient   0                      the generalised (Bregman) divergence on S: zero exactly when p = q on S
raw             -1                     descends the student's own mass on S; its optimum is p = q / e on S
==============  =====================  ==========================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.ops import logprobs as lp

__all__ = ["FullVocab", "MatchedVocab", "SampledToken", "Support", "TopK", "WrittenToken"]

Chooser = Literal["student", "teacher", "union", "intersection"]
Moment = Literal["scoring", "sampling"]
Closure = Literal["tail", "renormalize", "renormalize_teacher", "stop_gradient", "sampled_tail", "raw"]


class Scores(NamedTuple):
    """What is left of the vocabulary, per token.

    Attributes:
        direct: (N,) differentiated as it stands.
        reward: (N,) detached advantage of the token itself, multiplied by the score function; None if there is none.
        cost: (N,) detached cost that earlier tokens answer for; None if it is not defined.
    """

    direct: Tensor | None
    reward: Tensor | None
    cost: Tensor | None


class Closed(NamedTuple):
    """Two laws on a truncated support.

    Attributes:
        ids: (N, K) entries.
        counts: (N, K) False for repeated entries of a union, and for those outside an intersection.
        student, teacher: (N, K), or (N, K + 1) with a tail: log-probabilities, made comparable by the closure.
    """

    ids: Tensor
    counts: Tensor
    student: Tensor
    teacher: Tensor


class World(NamedTuple):
    """The laws in which a drawn token is judged: by its support, its baseline and its route alike.

    Attributes:
        student, teacher: (N, J) log-probabilities, of the vocabulary's entries or of a coarsening; only the first is
            differentiated.
        tokens: (N,) the entry that holds the drawn token.
        tail: True if the last entry stands for all tokens that have none of their own.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor
    tail: bool = False


class Support(Configurable, ABC):
    """A choice of vocabulary entries.

    Attributes:
        sampled: True if it stands on the drawn token and needs the recorded sampler log-probabilities.
        summed: True if entries are summed and differentiated through (`Scores.direct`).
        needs_teacher: False if the text alone is the target.
        record_top_k: how many of the student's likeliest tokens must be recorded when the text is written.
        crosses: True if it compares laws of two vocabularies.
    """

    crosses: bool = False
    sampled: bool = False
    summed: bool = True
    needs_teacher: bool = True
    record_top_k: int = 0

    @abstractmethod
    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        """Compare the two laws at every token.

        Args:
            divergence: what is compared at one entry.
            student: log-probabilities; gradient flows into them.
            teacher: log-probabilities of the target; None if it is not needed.
            tokens: those that were drawn.
            recorded: the student's `record_top_k` likeliest tokens when the text was written; given only if asked for.
        """

    def world(self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N W"], tokens: Int[Tensor, " N"]) -> World:
        """What drawn tokens are judged in; the vocabulary unless a support says otherwise."""
        return World(student, teacher, tokens)

    def common(
        self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N W"], matched: Bool[Tensor, " V"] | None
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"], dict[str, Tensor]]:
        """Both laws over one vocabulary, for measurements, and measurements of its own. Detached."""
        return student, teacher, {}

    @property
    @abstractmethod
    def title(self) -> str:
        """What `declared_target` prints."""


class FullVocab(Support):
    """Every vocabulary entry: the exact divergence. With a local teacher this costs no more than a top-k, whose
    normalisers need the full logits too.
    """

    title = "full vocabulary"

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        assert teacher is not None
        value = divergence.total(student, teacher)
        return Scores(direct=value, reward=None, cost=value.detach())


class TopK(Support):
    """The k likeliest entries, closed to a proper comparison.

    Args:
        k: entries per chooser, at least 1.
        by: who picks: ``student``, ``teacher``, their ``union`` or their ``intersection``.
        closure: what stands for the rest (table at the head of this module). ``raw`` drains the student's own mass and
            is accepted only under ``allow_degenerate: true``.
        ids: when the student picks: ``scoring``, by its law as it is, or ``sampling``, by the one that it had when the text was
            written (recorded with the rollout at the price of one more pass over it). They differ on stale rollouts.

    Raises:
        ValueError: for k < 1, an unknown chooser or closure, or ids of a student that picks nothing.
    """

    def __init__(self, k: int, by: Chooser = "student", closure: Closure = "tail", ids: Moment = "scoring") -> None:
        if k < 1:
            raise ValueError(f"TopK(k={k}): k must be at least 1")
        for key, given, literal in (("by", by, Chooser), ("closure", closure, Closure), ("ids", ids, Moment)):
            if given not in get_args(literal):
                raise ValueError(f"TopK({key}={given!r}): allowed are {', '.join(get_args(literal))}")
        if ids == "sampling" and by == "teacher":
            raise ValueError("TopK(by='teacher', ids='sampling'): the student picks nothing; leave ids at 'scoring'")
        self.k, self.by, self.closure, self.ids = k, by, closure, ids
        self.sampled = closure == "sampled_tail"
        self.record_top_k = k if ids == "sampling" else 0

    @property
    def title(self) -> str:
        when = " when it wrote" if self.ids == "sampling" else ""
        return f"top-{self.k} by {self.by}{when}, closure {self.closure}"

    def _ids(self, student: Tensor, teacher: Tensor, recorded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Entry ids (N, K) and which of them count. Repeated entries of a union count once."""
        vocab = student.shape[-1]
        k = min(self.k, vocab)
        if self.by == "teacher":
            ids = teacher.topk(k, -1).indices
            return ids, torch.ones_like(ids, dtype=torch.bool)
        ids = student.detach().topk(k, -1).indices if recorded is None else recorded[:, :k].long()
        if self.by == "student":
            return ids, torch.ones_like(ids, dtype=torch.bool)
        theirs = teacher.topk(k, -1).indices
        if self.by == "intersection":
            return ids, lp.membership(ids, theirs, vocab)
        new = ~lp.membership(theirs, ids, vocab)
        return torch.cat([ids, theirs], -1), torch.cat([torch.ones_like(new), new], -1)

    def closed(
        self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], recorded: Int[Tensor, "N K"] | None = None
    ) -> Closed:
        """Both laws on the support, the student's differentiable."""
        ids, counts = self._ids(student, teacher, recorded)
        s, t = (self._close(law.gather(-1, ids), counts, is_teacher) for law, is_teacher in ((student, False), (teacher, True)))
        return Closed(ids, counts, s, t)

    def _close(self, head: Float[Tensor, "N K"], counts: Bool[Tensor, "N K"], is_teacher: bool) -> Float[Tensor, "N J"]:
        """Log-probabilities on the support, made comparable by the closure."""
        head = head.where(counts, head.new_full((), lp.floor_of(head.dtype)))
        if self.closure == "renormalize" or (self.closure == "renormalize_teacher" and is_teacher):
            return head - head.logsumexp(-1, keepdim=True)
        if self.closure == "tail":
            return torch.cat([head, lp.tail_logmass(head)[:, None]], -1)
        return head

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        assert teacher is not None
        ids, counts, s, t = self.closed(student, teacher, recorded)
        if self.closure in ("raw", "renormalize_teacher"):
            value = divergence.raw(s, t).sum(-1)
        elif self.closure in ("stop_gradient", "sampled_tail"):
            value = divergence.entry(s, t).sum(-1)
        else:  # two laws of mass 1
            value = divergence.total(s, t)
        value = value.where(counts.any(-1), 0.0)  # an empty intersection compares nothing
        if self.closure != "sampled_tail":
            return Scores(direct=value, reward=None, cost=value.detach())
        inside = ((ids == tokens[:, None]) & counts).any(-1)
        on_token = lp.gather(student.detach(), tokens), lp.gather(teacher, tokens)
        return Scores(value, divergence.advantage(*on_token).masked_fill(inside, 0.0), divergence.value(*on_token))


class MatchedVocab(Support):
    """Two vocabularies: the divergence on the tokens of both, and the distance of the sorted probabilities of all others::

        sum_{v in both} d(p_v, q_v) + w sum_k | p_(k) - q_(k) |

    p_(1) >= p_(2) >= ... are of the student's other tokens, q_(k) of the teacher's; the shorter list is filled up with zeros.

    d is the divergence's entry that is never negative and 0 only where p_v = q_v, so the sum needs no laws of mass 1 and is 0
    only where the shared tokens agree. The first part stands in GOLD (TRL), the second is ULD (arXiv 2402.12030); which token
    an unshared one means is not known to either. So a student with longer tokens than the teacher's learns to spell in the
    teacher's: where it could write "12", the teacher's law says "1". With equal vocabularies it is `FullVocab`.

    Args:
        unmatched: w, at least 0. The distance has no unit, the divergence is in nats.

    Raises:
        ValueError: for a negative weight.
    """

    crosses = True
    title = "tokens of both vocabularies, sorted L1 on the others"

    def __init__(self, unmatched: float = 1.0) -> None:
        if unmatched < 0.0:
            raise ValueError(f"MatchedVocab(unmatched={unmatched}): must be at least 0 (0 leaves other tokens alone)")
        self.unmatched = unmatched

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N W"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
        matched: Bool[Tensor, " V"] | None = None,
    ) -> Scores:
        """``teacher``: W >= V log-probabilities, the first V in the order of the student's vocabulary. ``matched``: which
        of them are tokens of both; None for all.
        """
        assert teacher is not None
        vocab = student.shape[-1]
        if matched is None or (bool(matched.all()) and teacher.shape[-1] == vocab):
            value = divergence.total(student, teacher)
            return Scores(direct=value, reward=None, cost=value.detach())
        value = divergence.entry(student[:, matched], teacher[:, :vocab][:, matched]).sum(-1)
        if self.unmatched:
            ours, theirs = student[:, ~matched].exp(), teacher[:, vocab:].exp()
            width = max(ours.shape[-1], theirs.shape[-1])
            ours, theirs = (
                torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (ours, theirs)
            )
            value = value + self.unmatched * (ours - theirs).abs().sum(-1)
        return Scores(direct=value, reward=None, cost=value.detach())

    def common(
        self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N W"], matched: Bool[Tensor, " V"] | None
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"], dict[str, Tensor]]:
        """Both laws given that the token is one of both vocabularies, and how much mass that is."""
        if matched is None:
            return student, teacher, {}
        teacher = teacher[:, : student.shape[-1]]
        shared = [x.masked_fill(~matched, lp.floor_of(x.dtype)) for x in (student, teacher)]
        mass = [x[:, matched].logsumexp(-1, keepdim=True) for x in shared]
        ours, theirs = (lp.log_softmax(x) for x in shared)
        names = ("matched_student_mass", "matched_teacher_mass")
        return ours, theirs, {name: m.squeeze(-1).exp() for name, m in zip(names, mass, strict=True)}


class SampledToken(Support):
    """The drawn token alone, as a policy gradient: ``- rho * advantage``, ``rho = p / p_sampler`` with the sampler's
    **recorded** log-probability.

    With ReverseKL this is the loss of Thinking Machines' on-policy distillation. It is unbiased for the full sum and
    needs one teacher number per token, at the price of the sampling noise.

    Args:
        k: 0, or the size of a closed world: the student's and the teacher's k likeliest tokens, and one tail entry for all
            others. Advantage, baseline and route then know these entries alone, and the estimator is unbiased for the
            divergence of this coarsening, whose entries depend on the state only. A token of the tail has the tail's
            log-ratio, and its own score function.

    Raises:
        ValueError: for a negative k.
    """

    sampled = True
    summed = False
    title = "sampled token"

    def __init__(self, k: int = 0) -> None:
        if k < 0:
            raise ValueError(f"SampledToken(k={k}): must be at least 0 (0 keeps the whole vocabulary)")
        self.k = k
        if k:
            self.title = f"sampled token among the top-{k} of both and a tail"

    def world(self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> World:
        if not self.k:
            return super().world(student, teacher, tokens)
        ids, _, ours, theirs = TopK(self.k, "union", "tail").closed(student, teacher)
        found = ids == tokens[:, None]  # a repeated entry is found at its first place, which counts
        entry = torch.where(found.any(-1), found.int().argmax(-1), ids.shape[-1])
        return World(ours, theirs, entry, tail=True)

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        assert teacher is not None
        s, t = lp.gather(student.detach(), tokens), lp.gather(teacher, tokens)
        return Scores(direct=None, reward=divergence.advantage(s, t), cost=divergence.value(s, t))


class WrittenToken(Support):
    """The token that somebody else wrote is itself the target: ``- log p(token)``, the likelihood of the text.

    One sample of the forward KL from its writer, on the writer's own states. This is sequence-level distillation
    (Kim & Rush 2016) on teacher text and supervised fine-tuning on reference text; no teacher is run. On the student's
    own text its expected gradient is zero, so that source is refused.
    """

    needs_teacher = False
    title = "written token"

    def score(
        self,
        divergence: Divergence,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"] | None,
        tokens: Int[Tensor, " N"],
        recorded: Int[Tensor, "N K"] | None = None,
    ) -> Scores:
        return Scores(direct=-lp.gather(student, tokens), reward=None, cost=None)
