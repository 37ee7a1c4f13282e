"""The gradient that a composition declares, in closed form over a `TabularWorld`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from opd_lightning.inspect import textbook
from opd_lightning.objectives import GAE, Additive, KStep, LengthNormalised, Objective, SequenceMean, TopK, WrittenToken
from opd_lightning.objectives.gates import View
from opd_lightning.objectives.validate import bias_of_route
from opd_lightning.ops import logprobs as lp

if TYPE_CHECKING:
    from opd_lightning.inspect.oracle import TabularWorld, Writer


class Local(NamedTuple):
    """What an objective does at every state.

    Attributes:
        value: (S,) differentiable; its gradient is the expected gradient of the state's own token.
        cost: (S,) expected cost for the tokens before.
        student, aim: (S, V) log-probabilities of the student (differentiable) and of its target.
    """

    value: Tensor
    cost: Tensor
    student: Tensor
    aim: Tensor


def local_of(world: TabularWorld, objective: Objective, reference: Tensor | None, progress: float) -> Local:
    """Compare the laws at every state, exactly."""
    student = lp.log_softmax(world.student, objective.temperature)
    teacher = lp.log_softmax(world.teacher, objective.temperature)
    third = lp.log_softmax(reference.double(), objective.temperature) if reference is not None else None
    aim = objective.target.law(student.detach(), teacher, third, progress).detach()
    if not objective.shaper.title:
        value = textbook.between(objective, student.exp(), aim.exp(), world.teacher.softmax(-1))
        return Local(value, value.detach(), student, aim)
    judged = [law.log() for law in textbook.seen(objective, student.detach().exp(), aim.exp())]
    bent = [objective.shaper.shape(x, *judged) for x in _signals(objective, *judged)]
    value, cost = (-(student.exp() * x).sum(-1) for x in bent)
    return Local(value, cost.detach(), student, aim)


def _signals(objective: Objective, student: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    return objective.divergence.advantage(student, aim), -objective.divergence.value(student, aim)


def credited(world: TabularWorld, objective: Objective, local: Local, critic: Tensor | None) -> Tensor | None:
    """(S,) what reaching a state costs the token that leads to it, in expectation; None for nothing."""
    credit, gamma = objective.credit, objective.credit.gamma
    if gamma == 0.0:
        return None
    if isinstance(credit, KStep):
        return gamma * world.discounted(local.cost, gamma, credit.k - 1)
    if not isinstance(credit, GAE) or credit.lam == 1.0:
        return gamma * world.discounted(local.cost, gamma)
    future = critic.double() if critic is not None and credit.critic else torch.zeros_like(local.cost)
    value = -local.cost + gamma * future
    error = -local.cost + gamma * world.expected(value) - value  # mean of delta
    return -gamma * (value + credit.lam * world.discounted(error, gamma * credit.lam))


def gate_weights(world: TabularWorld, objective: Objective, local: Local) -> Tensor:
    """(S,) product of the gates, which must look at states alone."""
    depth = torch.tensor([len(prefix) for prefix in world.states])
    mask = torch.arange(world.horizon) <= depth[:, None]
    weights = torch.ones_like(local.cost)
    student, teacher = local.student.detach(), lp.log_softmax(world.teacher, objective.temperature)

    def along(values: Tensor) -> Tensor:
        return values[:, None] * mask

    nothing = torch.zeros(mask.shape, dtype=torch.float64)
    kl = (student.exp() * (student - teacher)).sum(-1)
    seen = along(lp.entropy(student)), along(lp.entropy(teacher)), along(kl)
    view = View(mask, nothing.long(), nothing, nothing, *seen, advantage=nothing, vocab=world.vocab)
    for gate in objective.gates:
        weights = weights * gate.weight(view).gather(-1, depth[:, None]).squeeze(-1)
    return weights


def refuse_without_closed_form(objective: Objective, writer: Writer) -> None:
    """Raises:
    ValueError: for what declares a direction but no closed form.
    """
    for found, what in (
        (any(gate.depends_on != "state" for gate in objective.gates), "gates that look at drawn tokens"),
        (bool(bias_of_route(objective)), "routes that add a pull of their own"),
        (isinstance(objective.credit, LengthNormalised), "LengthNormalised"),
        (bool(objective.outcome.title) and not _plainly_added(objective, writer), "outcomes"),
        (bool(objective.support.record_top_k) and writer == "sampler", "the support of another student"),
        (isinstance(objective.reduction, SequenceMean) and _looks_further(objective), "this under SequenceMean"),
    ):
        if found:
            raise ValueError(f"no closed form for {what}; compare `moments_of` with a sum over `world.paths` of your own")


def _plainly_added(objective: Objective, writer: Writer) -> bool:
    """Grades whose policy gradient nothing else weighs."""
    weighed = objective.gates or isinstance(objective.reduction, SequenceMean) or writer != "student"
    return isinstance(objective.outcome, Additive) and not weighed


def _looks_further(objective: Objective) -> bool:
    from_definition = type(objective.credit).__name__ in ("Immediate", "Discounted", "ReturnToGo")
    bent = objective.gates or objective.shaper.title or objective.route.title or objective.credit.analytic
    half_sampled = isinstance(objective.support, TopK) and objective.support.sampled
    return bool(bent) or half_sampled or not from_definition


def per_completion(world: TabularWorld, objective: Objective, local: Local, writer: Writer) -> Tensor:
    """Gradient of ``sum_y P(y) / |y| * sum_t [...]`` with P held fixed, the brackets in closed form."""
    gamma, sampled = objective.credit.gamma, objective.support.sampled
    student = local.student
    advantage = sample_cost = torch.zeros_like(world.teacher)
    if sampled:
        p, q = textbook.seen(objective, student.detach().exp(), local.aim.exp())
        advantage = textbook.advantage(objective.divergence, p, q)
        sample_cost = objective.divergence.value(p.log(), q.log())  # which f stands for the cost is its choice
    total = student.new_zeros(())
    for path in world.paths:
        steps = list(zip(path.states, path.tokens, strict=True))
        costs = [sample_cost[s, v] if sampled else local.cost[s] for s, v in steps]
        inner = student.new_zeros(())
        for t, (s, v) in enumerate(steps):
            later = sum((gamma**k * costs[t + k] for k in range(1, len(steps) - t)), student.new_zeros(()))
            if isinstance(objective.support, WrittenToken):
                inner = inner - student[s, v]
            elif sampled:
                inner = inner + (later - advantage[s, v]) * student[s, v]
            else:
                inner = inner + local.value[s] + later * student[s, v]
        total = total + path.probability(writer) / len(steps) * inner
    (gradient,) = torch.autograd.grad(total, world.student)
    return gradient
