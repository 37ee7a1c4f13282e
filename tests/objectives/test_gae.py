"""Generalised advantage estimation with a residual critic: its limits, its bias, and what the critic learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.inspect.oracle import Path, TableLaws, TabularWorld
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    Constant,
    Discounted,
    Extras,
    GeneralizedJSD,
    Immediate,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Term,
    Terms,
)
from opd_lightning.types import Rollout
from tests.objectives.textbook import Book, close, golden, reverse_kl, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)


def sampled(credit: object, **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(), credit, reduction=Constant(1.0), **axes)


def critic_of(at: TabularWorld, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(at.states), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_critic(book: Book, gamma: float) -> torch.Tensor:
    """W(s) = mean of V over the next states, V = - expected discounted sum of KL."""
    total = torch.tensor(book.values(book.kl, gamma), dtype=torch.float64)
    own = torch.tensor([book.kl(s) for s in range(len(book.p))], dtype=torch.float64)
    return (own - total) / gamma


def reference(book: Book, path: Path, gamma: float, lam: float, critic: torch.Tensor) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, V = - KL + gamma W, nothing behind the last token."""
    value = [-book.kl(s) + gamma * float(critic[s]) for s in path.states] + [0.0]
    rewards = book.rewards(path)
    delta = [r + gamma * value[t + 1] - value[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@each_world
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.0, 0.4)])
def test_advantages_on_every_completion(name: str, gamma: float, lam: float) -> None:
    book, critic = Book(WORLDS[name]), critic_of(WORLDS[name])
    found = WORLDS[name].gradients_of(sampled(GAE(gamma, lam)), critic=critic)
    close(found, book.scores(lambda path: reference(book, path, gamma, lam, critic)), 1e-12)
    close(
        WORLDS[name].moments_of(sampled(GAE(gamma, lam)), critic=critic).mean,
        WORLDS[name].declared_gradient(sampled(GAE(gamma, lam)), critic=critic),
    )


@each_world
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 1.0)])
def test_other_divergences_expect_their_cost_later_and_their_advantage_now(name: str, gamma: float, lam: float) -> None:
    """JSD: A = u f' - f is the signal of the token itself, f what later tokens cost, and V is made of means of f."""
    at, book, critic, beta = WORLDS[name], Book(WORLDS[name]), critic_of(WORLDS[name]), 0.3

    def f(s: int, v: int) -> float:
        u = book.q[s][v] / book.p[s][v]
        m = beta * u + 1 - beta
        return beta * u * math.log(u / m) - (1 - beta) * math.log(m) + beta * math.log(beta) * (u - 1)  # does not grow with u

    def advantages(path: Path) -> list[float]:
        steps = list(zip(path.states, path.tokens, strict=True))
        divergence = {s: sum(p * f(s, v) for v, p in enumerate(book.p[s])) for s in path.states}
        value = [-divergence[s] + gamma * float(critic[s]) for s in path.states] + [0.0]
        delta = [-f(s, v) + gamma * value[t + 1] - value[t] for t, (s, v) in enumerate(steps)]
        own = [(1 - beta) * math.log(beta * book.q[s][v] / book.p[s][v] + 1 - beta) + f(s, v) for s, v in steps]
        return [x + sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t, x in enumerate(own)]

    axes = {"divergence": GeneralizedJSD(beta), "support": SampledToken(), "reduction": Constant(1.0)}
    close(at.gradients_of(Objective(**axes, credit=GAE(gamma, lam)), critic=critic), book.scores(advantages), 1e-12)
    if lam == 1.0:
        unbiased = at.moments_of(Objective(**axes, credit=Discounted(gamma))).mean
        close(at.moments_of(Objective(**axes, credit=GAE(gamma, lam)), critic=critic).mean, unbiased)


def test_golden_exact_value() -> None:
    found = golden().moments_of(sampled(GAE(1.0, 0.0)), critic=exact_critic(Book(golden()), 1.0))
    close(-found.mean[0], torch.tensor([-0.35655472, 0.11575749, 0.24079723], dtype=torch.float64), 6e-8)
    assert found.trace == pytest.approx(0.50104304, abs=6e-9)


@each_world
def test_without_discounted_future_it_is_the_closed_form_baseline_whatever_lambda_and_critic(name: str) -> None:
    expected = WORLDS[name].gradients_of(sampled(Immediate(), baseline=ClosedFormBaseline()))
    for lam in (0.0, 0.5, 1.0):
        for critic in (None, critic_of(WORLDS[name])):
            close(WORLDS[name].gradients_of(sampled(GAE(0.0, lam)), critic=critic), expected, 1e-13)


@each_world
def test_an_untrained_critic_is_a_zero_critic_and_an_unasked_one_is_not_used(name: str) -> None:
    zero = torch.zeros(len(WORLDS[name].states), dtype=torch.float64)
    expected = WORLDS[name].gradients_of(sampled(GAE(0.9, 0.5)), critic=zero)
    close(WORLDS[name].gradients_of(sampled(GAE(0.9, 0.5)), critic=None), expected, 1e-14)
    close(
        WORLDS[name].gradients_of(sampled(GAE(0.9, 0.5, train_critic=False)), critic=critic_of(WORLDS[name])), expected, 1e-14
    )


@each_world
@pytest.mark.parametrize(("gamma", "lam"), [(0.8, 0.6), (1.0, 0.3)])
def test_a_value_of_zero_gives_the_return_discounted_by_both(name: str, gamma: float, lam: float) -> None:
    book = Book(WORLDS[name])
    nothing = torch.tensor([book.kl(s) / gamma for s in range(len(book.p))], dtype=torch.float64)  # V = -KL + gamma W = 0
    found = WORLDS[name].gradients_of(sampled(GAE(gamma, lam)), critic=nothing)
    close(found, WORLDS[name].gradients_of(sampled(Discounted(gamma * lam))), 1e-12)


@each_world
@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_lambda_one_is_unbiased_whatever_the_critic_says(name: str, gamma: float) -> None:
    expected = WORLDS[name].moments_of(sampled(Discounted(gamma))).mean
    for critic in (None, critic_of(WORLDS[name], 1), 100.0 + 30.0 * critic_of(WORLDS[name], 2)):
        close(WORLDS[name].moments_of(sampled(GAE(gamma, 1.0)), critic=critic).mean, expected)


@each_world
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_an_exact_critic_is_unbiased_whatever_lambda(name: str, lam: float) -> None:
    critic = exact_critic(Book(WORLDS[name]), 1.0)
    found = WORLDS[name].moments_of(sampled(GAE(1.0, lam)), critic=critic)
    close(found.mean, Book(WORLDS[name]).gradient_of_sum(reverse_kl, 1.0))


@each_world
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.0), (1.0, 0.6), (0.7, 0.3)])
def test_bias_of_a_wrong_critic_in_closed_form(name: str, gamma: float, lam: float) -> None:
    """(1 - lam) sum_k gamma^k lam^(k-1) E sum_t e(s_{t+k}) grad log p(y_t), e = value - true value."""
    at, book, critic = WORLDS[name], Book(WORLDS[name]), critic_of(WORLDS[name])
    error = (gamma * (critic - exact_critic(book, gamma))).tolist()

    def advantages(path: Path) -> list[float]:
        n = len(path.states)
        return [
            (1 - lam) * sum(gamma**k * lam ** (k - 1) * error[path.states[t + k]] for k in range(1, n - t)) for t in range(n)
        ]

    bias = at.moments_of(sampled(GAE(gamma, lam)), critic=critic).mean - at.moments_of(sampled(Discounted(gamma))).mean
    close(bias, book.mean(book.scores(advantages)))
    assert bias.abs().max() > 1e-2


def test_a_constant_error_is_harmless_only_where_all_completions_are_equally_long() -> None:
    for name, lam, low, high in (("fixed", 0.0, 0.0, 1e-12), ("eos", 0.0, 0.1, 9.0), ("eos", 1.0, 0.0, 1e-12)):
        at = WORLDS[name]
        right = exact_critic(Book(at), 1.0)
        ends = [at.moments_of(sampled(GAE(1.0, lam)), critic=critic).mean for critic in (right, right + 3.0)]
        assert low <= (ends[0] - ends[1]).norm() <= high, (name, lam)


def test_ended_and_cut_completions_are_treated_alike() -> None:
    at = WORLDS["eos"]
    batch = Rollout.cat([at.rollout(path) for path in at.paths])
    states = torch.tensor([s for path in at.paths for s in path.states])
    laws, extras = TableLaws(at.teacher[states]), Extras(critic=critic_of(at)[states])
    ended, cut = (
        sampled(GAE(0.9, 0.5))(
            TableLaws(at.student.detach()[states]), laws, replace(batch, ended=torch.full_like(batch.ended, x)), extras=extras
        ).token_loss
        for x in (True, False)
    )
    close(ended, cut, 0.0)


# ---- the critic ----------------------------------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_the_critic_regresses_on_the_exact_future_and_nothing_else_moves_it(name: str, gamma: float) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    for path in at.paths:
        states = torch.tensor(path.states)
        student = at.student.detach()[states].requires_grad_(True)
        teacher = at.teacher[states].requires_grad_(True)
        critic = critic_of(at)[states].requires_grad_(True)
        extras = Extras(critic=critic)
        loss = sampled(GAE(gamma, 0.5))(TableLaws(student), TableLaws(teacher), at.rollout(path), extras=extras).loss
        on_student, on_teacher, on_critic = torch.autograd.grad(loss, [student, teacher, critic], allow_unused=True)
        kls, n = book.kls(path), len(path.states)
        goals = [-sum(gamma ** (k - 1) * kls[t + k] for k in range(1, n - t)) for t in range(n)]
        close(on_critic, critic.detach() - torch.tensor(goals, dtype=torch.float64), 1e-12)
        assert on_teacher is None
        frozen = Extras(critic=critic.detach())
        alone = sampled(GAE(gamma, 0.5))(TableLaws(student), TableLaws(teacher), at.rollout(path), extras=frozen).loss
        close(on_student, torch.autograd.grad(alone, student)[0], 0.0)


@each_world
def test_the_mean_target_of_the_critic_is_the_expected_future_value(name: str) -> None:
    """At W = the exact future value the expected gradient of the critic vanishes, state by state."""
    at, book = WORLDS[name], Book(WORLDS[name])
    right, pull = exact_critic(book, 0.8), torch.zeros(len(book.p), dtype=torch.float64)
    for path in at.paths:
        states = torch.tensor(path.states)
        critic = right[states].requires_grad_(True)
        laws = TableLaws(at.student.detach()[states]), TableLaws(at.teacher[states])
        loss = sampled(GAE(0.8, 0.5))(*laws, at.rollout(path), extras=Extras(critic=critic)).loss
        pull.index_add_(0, states, path.student * torch.autograd.grad(loss, critic)[0])
    assert pull.abs().max() < 1e-12


def test_a_critic_beside_a_term_without_one_stays_finite() -> None:
    """Terms hand the critic to every term; one that has no use for it must not touch it."""
    at, critic = WORLDS["eos"], critic_of(WORLDS["eos"])
    plain, learned = sampled(GAE(0.0, 0.5)), sampled(GAE(0.9, 0.5))
    both = at.gradients_of(Terms([Term(plain), Term(learned), Term(sampled(ReturnToGo()))]), critic=critic)
    single = [at.gradients_of(o, critic=critic) for o in (plain, learned, sampled(ReturnToGo()))]
    close(both, sum(single), 1e-12)


@pytest.mark.parametrize("critic", [None, 0.0], ids=["no critic", "zero critic"])
def test_an_identical_teacher_gives_zero(critic: float | None) -> None:
    table = WORLDS["eos"].student.detach()
    agreed = TabularWorld(table, table.clone(), horizon=3, eos=2)
    values = None if critic is None else torch.full((len(agreed.states),), critic, dtype=torch.float64)
    for gamma, lam in ((0.0, 0.5), (0.9, 0.5), (1.0, 1.0)):
        assert agreed.gradients_of(sampled(GAE(gamma, lam)), critic=values).abs().max() < 1e-13


@each_world
def test_the_critics_error_is_reported_beside_the_loss_and_not_in_it(name: str) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    batch = Rollout.cat([at.rollout(path) for path in at.paths])
    states = torch.tensor([s for path in at.paths for s in path.states])
    laws, critic = (TableLaws(at.student.detach()[states]), TableLaws(at.teacher[states])), critic_of(at)
    out = sampled(GAE(0.8, 0.5))(*laws, batch, extras=Extras(critic=critic[states]))
    advantages = [a for path in at.paths for a in reference(book, path, 0.8, 0.5, critic)]
    close(-out.token_loss[batch.mask], torch.tensor(advantages, dtype=torch.float64), 1e-6)
    errors = []
    for path in at.paths:
        kls, n = book.kls(path), len(path.states)
        goals = [-sum(0.8 ** (k - 1) * kls[t + k] for k in range(1, n - t)) for t in range(n)]
        errors += [0.5 * (float(critic[s]) - goal) ** 2 for s, goal in zip(path.states, goals, strict=True)]
    close(out.stats.values["critic_loss"], torch.tensor(errors, dtype=torch.float64), 1e-10)
    close(out.loss, out.token_loss.sum() + sum(errors), 1e-9)
    both = Terms([Term(sampled(Immediate())), Term(sampled(GAE(0.8, 0.5)), weight=0.5)])
    split = both(*laws, replace(batch, scale=(1.0, 1.0)), extras=Extras(critic=critic[states]))
    close(split.stats.values["critic_loss"], 0.5 * out.stats.values["critic_loss"], 1e-10)
    assert "critic_loss" not in sampled(Immediate())(*laws, batch).stats.values
