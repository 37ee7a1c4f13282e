"""Exact expected gradients, by enumeration of every completion of a tiny world.

A `TabularWorld` has one logit vector per prefix for the student and one for the teacher, a vocabulary of a few tokens and a
horizon of a few steps. All completions are enumerated with their probabilities, so the expectation and the covariance of any
loss's gradient are sums, in float64, not estimates. Use it on your own loss::

    world = TabularWorld.random(vocab=4, horizon=3, seed=0, eos=3)
    mine = world.moments(lambda rollout, student, teacher: my_loss(student.table, teacher.table, rollout))
    exact = world.gradient(reverse_kl, gamma=0.0)
    print((mine.mean - exact).abs().max(), mine.trace)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.inspect import declared
from opd_lightning.objectives import Additive, Extras, Objective, SequenceMean
from opd_lightning.types import NOT_A_STUDENT, Completion, Prompt, Rollout, TableLaws

StateDivergence = Callable[[Tensor, Tensor], Tensor]
"""(student log-probs (S, V), teacher log-probs (S, V)) -> (S,), differentiable in the student."""

Writer = Literal["student", "teacher", "sampler"]
PROMPT_TOKEN = 0


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher) of every row."""
    return (student.exp() * (student - teacher)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of every row."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@dataclass(frozen=True)
class Moments:
    """Exact moments of a gradient over the student's completions.

    Attributes:
        mean: (S, V) expected gradient with respect to the student's logits, state by state.
        trace: trace of its covariance.
    """

    mean: Tensor
    trace: float


@dataclass(frozen=True)
class Path:
    """One completion: its tokens, the states that it visits, and its probability under every law."""

    tokens: tuple[int, ...]
    states: tuple[int, ...]
    student: float
    teacher: float
    ended: bool
    sampler: float = 0.0

    def probability(self, writer: Writer) -> float:
        return {"student": self.student, "teacher": self.teacher, "sampler": self.sampler}[writer]


class TabularWorld:
    """All prefixes of a small vocabulary up to a horizon, with a student and a teacher law at each.

    Completions are graded 1 where their last token is 0, else 0.

    Args:
        student: (S, V) logits, one row per prefix in the order of `states`.
        teacher: (S, V) logits.
        horizon: longest completion.
        eos: token that ends a completion, or None for a fixed length.
        sampler: (S, V) logits of a third law that may write, say an older student; None for the student's own.

    Raises:
        ValueError: if a table does not have one row per prefix.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, horizon: int, eos: int | None = None, sampler: Tensor | None = None
    ) -> None:
        sampler = student.detach() if sampler is None else sampler
        self.vocab, self.horizon, self.eos = student.shape[1], horizon, eos
        self.states: list[tuple[int, ...]] = [()]
        for prefix in self.states:  # grows while it is read: breadth first
            if len(prefix) < horizon - 1:
                self.states += [(*prefix, v) for v in range(self.vocab) if v != eos]
        for name, table in (("student", student), ("teacher", teacher), ("sampler", sampler)):
            if table.shape != (len(self.states), self.vocab):
                raise ValueError(
                    f"{name} table has shape {tuple(table.shape)}; vocabulary {self.vocab}, horizon {horizon} and eos "
                    f"{eos} make {len(self.states)} prefixes: {(len(self.states), self.vocab)}"
                )
        self.student = student.detach().double().clone().requires_grad_(True)  # the caller's table stays as it is
        self.teacher, self.sampler = teacher.detach().double(), sampler.detach().double()
        self._number = {prefix: i for i, prefix in enumerate(self.states)}
        self.paths = self._enumerate()

    @classmethod
    def random(cls, vocab: int, horizon: int, seed: int, eos: int | None = None, scale: float = 1.0) -> TabularWorld:
        """Independent normal logits for student and teacher, times ``scale``."""
        branching = vocab if eos is None else vocab - 1
        count = sum(branching**depth for depth in range(horizon))
        generator = torch.Generator().manual_seed(seed)
        student, teacher = scale * torch.randn(2, count, vocab, generator=generator, dtype=torch.float64)
        return cls(student, teacher, horizon, eos)

    @classmethod
    def from_probabilities(cls, student: Tensor, teacher: Tensor, horizon: int, eos: int | None = None) -> TabularWorld:
        """Tables of probabilities instead of logits."""
        return cls(student.double().log(), teacher.double().log(), horizon, eos)

    def _enumerate(self) -> list[Path]:
        law, theirs, third = (table.detach().softmax(-1) for table in (self.student, self.teacher, self.sampler))
        done: list[Path] = []
        growing = [Path((), (), 1.0, 1.0, ended=False, sampler=1.0)]
        while growing:
            path = growing.pop()
            i = self._number[path.tokens]
            for v in range(self.vocab):
                ended = v == self.eos
                longer = Path(
                    tokens=(*path.tokens, v),
                    states=(*path.states, i),
                    student=path.student * float(law[i, v]),
                    teacher=path.teacher * float(theirs[i, v]),
                    ended=ended,
                    sampler=path.sampler * float(third[i, v]),
                )
                (done if ended or len(longer.tokens) == self.horizon else growing).append(longer)
        return done

    def laws(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities (S, V) of student (differentiable) and teacher."""
        return self.student.log_softmax(-1), self.teacher.log_softmax(-1)

    def _table(self, writer: Writer) -> Tensor:
        return {"student": self.student, "teacher": self.teacher, "sampler": self.sampler}[writer]

    # ---- estimators ----------------------------------------------------------------------------------------------------
    def rollout(self, path: Path, writer: Writer = "student") -> Rollout:
        """The completion as a batch of one, with the writer's recorded log-probabilities, in float64. The student's likeliest
        tokens when it was written are those of the third law if that one wrote it.
        """
        law = self._table(writer).detach().log_softmax(-1)
        recorded = [float(law[s, v]) for s, v in zip(path.states, path.tokens, strict=True)]
        step = NOT_A_STUDENT if writer == "teacher" else 0
        prompt = Prompt(index=0, text="", ids=(PROMPT_TOKEN,))
        rollout = Rollout.of([prompt], [Completion(path.tokens, tuple(recorded), path.ended, step)], pad_id=PROMPT_TOKEN)
        then = self._table("sampler" if writer == "sampler" else "student").detach()
        ranked = then[list(path.states)].sort(-1, descending=True).indices[None]
        recorded_at = torch.tensor([recorded], dtype=torch.float64)
        grade = torch.tensor([self.grade(path)], dtype=torch.float64)
        return replace(rollout, sampler_logprobs=recorded_at, scale=(1.0,), top_ids=ranked, outcome=grade)

    @staticmethod
    def grade(path: Path) -> float:
        return float(path.tokens[-1] == 0)

    def moments(self, loss: Callable[[Rollout, TableLaws, TableLaws], Tensor], writer: Writer = "student") -> Moments:
        """Exact mean and covariance trace of the gradient of ``loss(rollout, student, teacher)`` over all completions."""
        mean, second = torch.zeros_like(self.teacher), 0.0
        for path in self.paths:
            rows = torch.tensor(path.states)
            value = loss(self.rollout(path, writer), TableLaws(self.student[rows]), TableLaws(self.teacher[rows]))
            (gradient,) = torch.autograd.grad(value, self.student)
            mean += path.probability(writer) * gradient
            second += path.probability(writer) * float(gradient.square().sum())
        return Moments(mean, second - float(mean.square().sum()))

    def gradients_of(
        self,
        objective: Objective,
        writer: Writer = "student",
        *,
        reference: Tensor | None = None,
        critic: Tensor | None = None,
        progress: float = 0.0,
        ahead: Tensor | None = None,
    ) -> Tensor:
        """(paths, S, V) gradient of an objective on every completion, summed over the completion's (weighted) tokens.

        An objective is a sum over rows, so one pass over all completions tells their gradients apart.

        Args:
            objective: one objective or `Terms`.
            writer: whose completions.
            reference: (S, V) logits of the reference, for targets that need it.
            critic: (S,) predictions, for `GAE`.
            progress: share of the run that is done.
            ahead: (S, V) cost of what follows every token (see `behind`), for look-ahead routes.
        """
        parts = [self.rollout(path, writer) for path in self.paths]
        batch = replace(Rollout.cat(parts), row=torch.arange(len(parts)), scale=(1.0,) * len(objective.flat()))
        states = torch.tensor([s for path in self.paths for s in path.states])
        owner = torch.tensor([i for i, path in enumerate(self.paths) for _ in path.states])
        rows = self.student.detach()[states].requires_grad_(True)
        third = TableLaws(reference.double()[states]) if reference is not None else None
        values, later = (table[states] if table is not None else None for table in (critic, ahead))
        extras = Extras(third, values, progress, later)
        loss = objective(TableLaws(rows), TableLaws(self.teacher[states]), batch, extras=extras).loss
        (gradient,) = torch.autograd.grad(loss, rows)
        per_path = torch.zeros(len(self.paths), *self.teacher.shape, dtype=torch.float64)
        return per_path.index_put_((owner, states), gradient, accumulate=True)

    def moments_of(
        self,
        objective: Objective,
        writer: Writer = "student",
        *,
        reference: Tensor | None = None,
        critic: Tensor | None = None,
        progress: float = 0.0,
        ahead: Tensor | None = None,
    ) -> Moments:
        """Moments of an objective of the package: the same as `moments`, in one pass (arguments: `gradients_of`)."""
        given = {"reference": reference, "critic": critic, "ahead": ahead}
        per_path = self.gradients_of(objective, writer, progress=progress, **given)
        weights = torch.tensor([path.probability(writer) for path in self.paths], dtype=torch.float64)
        mean = (weights[:, None, None] * per_path).sum(0)
        second = (weights * per_path.square().sum((1, 2))).sum()
        return Moments(mean, float(second - mean.square().sum()))

    def moments_of_advantages(self, advantages: Callable[[Path], list[float]]) -> Moments:
        """Moments of ``-sum_t A_t log p(y_t)`` for any advantages that may look at the whole completion."""
        by_tokens = {path.tokens: path for path in self.paths}

        def loss(rollout: Rollout, student: TableLaws, teacher: TableLaws) -> Tensor:
            tokens = rollout.text.targets[rollout.mask]
            logprobs = student.table.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            weights = torch.tensor(advantages(by_tokens[tuple(tokens.tolist())]), dtype=torch.float64)
            return -(weights * logprobs).sum()

        return self.moments(loss)

    # ---- targets -------------------------------------------------------------------------------------------------------
    def visitation(self, writer: Writer = "student") -> Tensor:
        """(S,) probability that the writer reaches every state."""
        law = self._table(writer).softmax(-1)
        reach: list[Tensor] = [law.new_ones(())]
        for prefix in self.states[1:]:
            parent = self._number[prefix[:-1]]
            reach.append(reach[parent] * law[parent, prefix[-1]])
        return torch.stack(reach)

    def value(self, divergence: StateDivergence, gamma: float = 1.0) -> Tensor:
        """(S,) expected discounted sum of the divergence from every state on, its own included."""
        return self.discounted(divergence(*self.laws()), gamma)

    def discounted(self, cost: Tensor, gamma: float = 1.0, steps: int | None = None) -> Tensor:
        """(S,) expected discounted sum of a cost per state over the next ``steps`` states (all), its own included."""
        out = torch.zeros_like(cost)
        for _ in range(self.horizon if steps is None else steps):
            out = cost + gamma * self.expected(out)
        return out

    def expected(self, values: Tensor) -> Tensor:
        """(S,) mean of a value per state over the student's next states; 0 where nothing follows."""
        return (self.student.softmax(-1) * self.behind(values)).sum(-1)

    def behind(self, values: Tensor) -> Tensor:
        """(S, V) the value of the state that every token leads to; 0 where nothing follows."""
        places = [self._number[prefix[:-1]] * self.vocab + prefix[-1] for prefix in self.states[1:]]
        out = values.new_zeros(len(self.states) * self.vocab)
        return out.index_copy(0, torch.tensor(places, dtype=torch.long), values[1:]).view(-1, self.vocab)

    def gradient(self, divergence: StateDivergence, gamma: float, writer: Writer = "student") -> Tensor:
        """(S, V) gradient of the target of a credit.

        gamma = 0: ``sum_s d(s) D(s)`` with the writer's visitation d held fixed. gamma = 1: ``E sum_t D(s_t)`` with the
        visitation differentiated too. Between them, the field in which a token answers for what comes k tokens later with
        weight gamma^k.
        """
        local = divergence(*self.laws())
        after = gamma * self.discounted(local, gamma) if gamma else None
        return self._field(local, after, writer)

    def declared_gradient(
        self,
        objective: Objective,
        writer: Writer = "student",
        *,
        reference: Tensor | None = None,
        critic: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """(S, V) gradient that ``objective.declared_target`` names, its declared biases included.

        It is computed from the formulas of `opd_lightning.inspect.textbook`, not with the objective's own code. A sampled
        token is replaced by the full sum that it stands for; only where the declared bias is that a weight
        depends on the sampled tokens (1 / length) is the sum taken over completions.

        Args:
            objective: one objective, not `Terms`.
            writer: whose completions.
            reference: (S, V) logits of the reference, for targets that need it.
            critic: (S,) predictions, for `GAE`.
            progress: share of the run that is done.

        Raises:
            ValueError: for compositions that name no closed form (gates on drawn tokens, unbalanced routes).
        """
        declared.refuse_without_closed_form(objective, writer)
        local = declared.local_of(self, objective, reference, progress)
        if isinstance(objective.reduction, SequenceMean):
            return declared.per_completion(self, objective, local, writer)
        after = declared.credited(self, objective, local, critic)
        field = self._field(local.value, after, writer, declared.gate_weights(self, objective, local))
        return field - objective.outcome.weight * self.graded() if isinstance(objective.outcome, Additive) else field

    def graded(self) -> Tensor:
        """(S, V) gradient of the expected grade of the student's completions."""
        law = self.student.log_softmax(-1)
        chances = torch.stack([law[list(path.states), list(path.tokens)].sum() for path in self.paths]).exp()
        grades = torch.tensor([self.grade(path) for path in self.paths], dtype=torch.float64)
        (gradient,) = torch.autograd.grad((chances * grades).sum(), self.student)
        return gradient

    def _field(self, local: Tensor, after: Tensor | None, writer: Writer, weights: Tensor | None = None) -> Tensor:
        """Gradient of every state's own divergence plus what its tokens answer for, on the writer's states."""
        if after is not None:
            local = local + self.expected(after.detach())
        visits = self.visitation(writer).detach() * (1.0 if weights is None else weights)
        (gradient,) = torch.autograd.grad((visits * local).sum(), self.student)
        return gradient
