"""Baselines made of other rollouts, over all groups of completions; those made of the two laws are in test_credits.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from opd_lightning.inspect.oracle import Path, TableLaws, TabularWorld
from opd_lightning.objectives import (
    BatchMean,
    Constant,
    CounterfactualRoute,
    DegenerateObjective,
    Discounted,
    Extras,
    ForwardKL,
    GroupMean,
    Immediate,
    NoBaseline,
    Objective,
    PrefixProduct,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    Term,
    Terms,
    WrittenToken,
)
from opd_lightning.types import Rollout
from tests.objectives.groups import gradients, mean
from tests.objectives.textbook import Book, close, reverse_kl, world, worlds

WORLDS = worlds()
each_world = pytest.mark.parametrize("name", WORLDS)
each_credit = pytest.mark.parametrize("credit", [Immediate(), ReturnToGo(), Discounted(0.6, analytic=True)], ids=repr)


def sampled(baseline: object, credit: object = Immediate(), **axes: object) -> Objective:
    return Objective(ReverseKL(), SampledToken(), credit, baseline, Constant(1.0), **axes)


def plain_advantages(book: Book, credit: object, path: Path) -> list[float]:
    rewards, later = book.rewards(path), book.kls(path) if credit.analytic else [-r for r in book.rewards(path)]
    n = len(rewards)
    return [r - sum(credit.gamma ** (k - t) * later[k] for k in range(t + 1, n)) for t, r in enumerate(rewards)]


# ---- the group -----------------------------------------------------------------------------------------------------------


@each_world
@each_credit
def test_group_mean_by_definition_and_without_bias(name: str, credit: object) -> None:
    """Over all pairs of completions: what the other one has at the same position, 0 where it has ended."""
    at, book = WORLDS[name], Book(WORLDS[name])
    pairs = list(product(at.paths, repeat=2))[:: 1 if name == "eos" else 3]
    found = gradients(at, pairs, sampled(GroupMean(), credit))
    plain = {path: plain_advantages(book, credit, path) for path in at.paths}
    for pair, gradient in list(zip(pairs, found, strict=True))[::7]:
        other = {id(pair[0]): plain[pair[1]], id(pair[1]): plain[pair[0]]}
        for path, row in zip(pair, gradient, strict=True):
            expected = torch.zeros_like(row)
            for t, (s, v) in enumerate(zip(path.states, path.tokens, strict=True)):
                b = other[id(path)][t] if t < len(other[id(path)]) else 0.0
                onehot = torch.nn.functional.one_hot(torch.tensor(v), book.vocab).double()
                expected[s] -= (plain[path][t] - b) * (onehot - torch.tensor(book.p[s], dtype=torch.float64))
            close(row, expected, 1e-12)
    if name == "eos":
        exact = at.moments_of(sampled(NoBaseline(), credit)).mean
        close(mean(pairs, found), exact)
        close(exact, at.declared_gradient(sampled(GroupMean(), credit)))
        assert (found.mean(1) - gradients(at, pairs, sampled(NoBaseline(), credit)).mean(1)).abs().max() > 0.1


def test_three_of_a_kind() -> None:
    """All triples: unbiased, also for the sequence level; the own advantage in the mean would shrink the gradient by 1/G."""
    at = world(2, 2, seed=3)
    book, triples = Book(at), list(product(at.paths, repeat=3))
    found = mean(triples, gradients(at, triples, sampled(GroupMean(), ReturnToGo())))
    exact = book.gradient_of_sum(reverse_kl, 1.0)
    close(found, exact)
    included = torch.zeros_like(found)
    for triple in triples:
        returns = [plain_advantages(book, ReturnToGo(), path) for path in triple]
        middle = [sum(r[t] for r in returns) / 3 for t in range(2)]
        own = book.scores(
            lambda path, triple=triple, middle=middle, returns=returns: (
                [a - m for a, m in zip(returns[0], middle, strict=True)] if path is triple[0] else [0.0, 0.0]
            )
        )
        chance = triple[0].student * triple[1].student * triple[2].student
        included += chance * own[at.paths.index(triple[0])]
    close(included, exact * 2 / 3)


def test_the_group_mean_lowers_the_variance_where_returns_share_a_level() -> None:
    """Far from the teacher every return is negative: the other rollout says by how much."""
    total = {"none": 0.0, "group": 0.0}
    for seed in range(5):
        at = world(3, 2, seed)
        far = TabularWorld(3.0 * at.student.detach(), -3.0 * at.student.detach(), at.horizon)
        pairs = list(product(far.paths, repeat=2))
        for name, baseline in (("none", NoBaseline()), ("group", GroupMean())):
            found = gradients(far, pairs, sampled(baseline, ReturnToGo()))[:, 0]
            chances = torch.tensor([a.student * b.student for a, b in pairs], dtype=torch.float64)
            second = (chances * found.square().sum((1, 2))).sum()
            total[name] += float(second - (chances[:, None, None] * found).sum(0).square().sum())
    assert total["group"] < 0.9 * total["none"]


@pytest.mark.parametrize("credit", [Immediate(), ReturnToGo()], ids=repr)
def test_completions_of_another_law_stay_corrected(credit: object) -> None:
    at = WORLDS["eos"]
    pairs = list(product(at.paths, repeat=2))
    found = mean(pairs, gradients(at, pairs, sampled(GroupMean(), credit, correction=PrefixProduct()), "sampler"), "sampler")
    close(found, at.moments_of(sampled(NoBaseline(), credit)).mean)


def test_groups_are_told_apart_by_number_and_rollouts_that_do_not_count_are_left_out() -> None:
    """Two groups of one prompt stay two; a foreign rollout among the student's own is nobody's baseline."""
    at = WORLDS["eos"]
    pairs = list(product(at.paths, repeat=2))
    whole = gradients(at, pairs, sampled(GroupMean(), ReturnToGo()))
    for i in (0, 100, 200):
        close(gradients(at, pairs[i : i + 1], sampled(GroupMean(), ReturnToGo()))[0], whole[i], 1e-13)
    own = Term(sampled(GroupMean()), rows="student")
    a, b, c = at.paths[0], at.paths[4], at.paths[7]
    batch = Rollout.cat([at.rollout(a), at.rollout(b), at.rollout(c, "teacher")])
    batch = replace(batch, row=torch.arange(3), group_size=3, scale=(1.0, 1.0))
    states = torch.tensor([*a.states, *b.states, *c.states])
    rows = at.student.detach()[states].requires_grad_(True)
    terms = Terms([own, Term(Objective(ForwardKL(), WrittenToken()), weight=1e-12, rows="others")])
    (found,) = torch.autograd.grad(terms(TableLaws(rows), TableLaws(at.teacher[states]), batch).loss, rows)
    both = torch.zeros(2, *at.teacher.shape, dtype=torch.float64)
    first = torch.tensor([0] * len(a.states) + [1] * len(b.states))
    both.index_put_((first, states[: len(first)]), found[: len(first)], accumulate=True)
    close(both, gradients(at, [(a, b)], sampled(GroupMean()))[0], 1e-10)


# ---- the batch -----------------------------------------------------------------------------------------------------------


@each_world
@each_credit
def test_batch_mean_is_a_constant_and_without_bias(name: str, credit: object) -> None:
    at, book = WORLDS[name], Book(WORLDS[name])
    singles = [(path,) for path in at.paths]
    past = torch.tensor([[-7.0, 4.0]], dtype=torch.float64)
    found = gradients(at, singles, sampled(BatchMean(), credit), past=past)
    close(found[:, 0], book.scores(lambda path: [a + 1.75 for a in plain_advantages(book, credit, path)]), 1e-12)
    close(mean(singles, found), at.moments_of(sampled(NoBaseline(), credit)).mean)
    assert "mean of earlier batches" in str(sampled(BatchMean(), credit).declared_target)
    first = gradients(at, singles, sampled(BatchMean(), credit))
    close(first, gradients(at, singles, sampled(NoBaseline(), credit)), 0.0)


def test_what_is_remembered() -> None:
    """Sum and number of the advantages before the baseline, whatever was subtracted; older steps fade."""
    at, book = WORLDS["eos"], Book(WORLDS["eos"])
    plain = [a for path in at.paths for a in plain_advantages(book, ReturnToGo(), path)]
    batch = Rollout.cat([at.rollout(path) for path in at.paths])
    states = torch.tensor([s for path in at.paths for s in path.states])
    laws = TableLaws(at.student.detach()[states]), TableLaws(at.teacher[states])
    objective = sampled(BatchMean(0.25), ReturnToGo())
    past = torch.tensor([[-3.0, 2.0]], dtype=torch.float64)
    seen = objective(*laws, batch, extras=Extras(past=past)).advantages
    close(seen, torch.tensor([[sum(plain), len(plain)]], dtype=torch.float64), 1e-10)
    close(objective.remember(None, seen), seen, 0.0)
    close(objective.remember(past, seen), seen + 0.25 * past, 1e-12)
    terms = Terms([Term(sampled(NoBaseline())), Term(objective)])
    both = terms(*laws, replace(batch, scale=(1.0, 1.0)), extras=Extras(past=torch.cat([past, past]))).advantages
    close(both, torch.cat([torch.zeros(1, 2, dtype=torch.float64), seen]), 1e-10)
    close(terms.remember(torch.cat([past, past]), both), both + torch.tensor([[0.0], [0.25]]) * past, 1e-10)
    for forgetful in (NoBaseline(), GroupMean()):
        assert sampled(forgetful)(*laws, batch).advantages is None


@pytest.mark.parametrize("baseline", [GroupMean(), BatchMean()], ids=repr)
def test_refused_where_they_would_bias_or_mislead(baseline: object) -> None:
    with pytest.raises(DegenerateObjective, match="1 / length"):
        Objective(ReverseKL(), SampledToken(), baseline=baseline, reduction=SequenceMean())
    with pytest.raises(DegenerateObjective, match="baseline of its own state"):
        sampled(baseline, route=CounterfactualRoute())
    with pytest.raises(ValueError, match="decay"):
        BatchMean(1.0)
