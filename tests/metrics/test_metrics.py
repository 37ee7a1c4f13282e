from __future__ import annotations

import itertools

import pytest
import torch

from opd_lightning.metrics import (
    AscentShare,
    Contains,
    DistinctNGrams,
    EntropyGap,
    ExactMatch,
    Imbalance,
    Leak,
    NegativeShare,
    NumberMatch,
    OverlapAdvantage,
    OverlapMass,
    PassAtK,
    RegexMatch,
    Repetition,
    SuppressionLeak,
    TeacherReach,
    TokenMean,
    TopKMass,
    TopKOverlap,
    told_elsewhere,
)


def test_token_mean_is_a_mean_over_tokens_not_of_means() -> None:
    mean = TokenMean()
    mean.update(torch.tensor([1.0]))
    mean.update(torch.tensor([4.0, 4.0, 4.0, float("nan")]))
    assert mean.compute().item() == pytest.approx(13 / 4)
    mean.reset()
    assert mean.compute().isnan()


@pytest.mark.parametrize(("correct", "total", "k"), [(0, 4, 2), (1, 4, 2), (3, 5, 2), (5, 5, 3), (2, 6, 6)])
def test_pass_at_k_against_all_subsets(correct: int, total: int, k: int) -> None:
    right = [i < correct for i in range(total)]
    subsets = list(itertools.combinations(right, k))
    metric = PassAtK(k)
    metric.update(correct, total)
    assert metric.compute().item() == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_completions() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        PassAtK(5).update(1, 4)


def test_agreement_metrics_average_over_tokens() -> None:
    student = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]).log()
    teacher = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1]]).log()
    overlap = TopKOverlap(k=1)
    overlap.update(student, teacher)
    assert overlap.compute().item() == 0.5
    mass = OverlapMass(k=1, who="teacher")
    mass.update(student, teacher)
    assert mass.compute().item() == pytest.approx(0.3)
    advantage = OverlapAdvantage(k=2)
    advantage.update(student, student)
    assert advantage.compute().item() == 0.0
    gap = EntropyGap()
    gap.update(student, torch.tensor([[1 / 3] * 3] * 2).log())
    entropies = -(student.exp() * student).sum(-1)
    assert gap.compute().item() == pytest.approx((torch.tensor(3.0).log() - entropies).mean().item(), rel=1e-5)


def test_graders() -> None:
    assert ExactMatch()({"answer": 12}, " 12\n") == 1.0
    assert ExactMatch()({"answer": 12}, "12.") == 0.0
    assert Contains("code")({"code": 3141}, "3141: seven minutes") == 1.0
    assert Contains("code")({"code": 3141}, "314: seven minutes") == 0.0
    assert NumberMatch()({"answer": "#### 1,200"}, "it costs 1200 dollars, or 1,200.00") == 1.0
    assert NumberMatch()({"answer": 3}, "no number") == 0.0
    assert RegexMatch(r"^Note:")({}, "Note: x") == 1.0
    with pytest.raises(ValueError, match="RegexMatch"):
        RegexMatch("(")
    with pytest.raises(KeyError, match="column 'answer'"):
        ExactMatch()({"gold": 1}, "1")


def test_what_is_suppressed_beyond_what_is_raised_is_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(50, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    imbalance, negative, mass = Imbalance(), NegativeShare(), TopKMass(k=3)
    for chunk in range(0, 50, 20):  # batches of unequal size
        for metric in (imbalance, negative, mass):
            metric.update(student[chunk : chunk + 20], teacher[chunk : chunk + 20])
    p, q = student.exp(), teacher.exp()
    assert imbalance.compute().item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert negative.compute().item() == pytest.approx(
        sum(p[i, v] for i in range(50) for v in range(9) if q[i, v] < p[i, v]) / 50
    )
    assert mass.compute().item() == pytest.approx(p.sort(-1, descending=True).values[:, :3].sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_of_large_vocabularies_do_not_collide(n: int) -> None:
    ids = torch.randint(2**21 - 8, 2**21, (900,), generator=torch.Generator().manual_seed(n))
    texts = [ids[:300], ids[300:], ids[:2]]
    tuples = [[tuple(t[i : i + n].tolist()) for i in range(len(t) - n + 1)] for t in texts]
    distinct, again = DistinctNGrams(n), Repetition(n)
    for text in texts:
        distinct.update([text])
        again.update([text])
    everything = [g for row in tuples for g in row]
    assert distinct.compute().item() == pytest.approx(len(set(everything)) / len(everything))
    repeated = [1 - len(set(row)) / len(row) for row in tuples if row]
    assert again.compute().item() == pytest.approx(sum(repeated) / len(repeated))
    with pytest.raises(ValueError, match="must be 1, 2 or 3"):
        Repetition(4)


def test_a_leak_is_what_only_the_teacher_was_shown_against_what_it_was_shown_elsewhere() -> None:
    """A student that cites its row's secret, one that cites what both read, one that says nothing of either."""
    prompts = [torch.tensor([1, 2, 3])] * 3
    told = [torch.tensor([1, 2, 3, 10 + i, 20 + i, 30 + i]) for i in range(3)]
    written = [torch.tensor([10, 20, 30, 9, 9]), torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])]

    def of(told: list[torch.Tensor], n: int) -> Leak:
        metric = Leak(n)
        metric.update(written, told, prompts)
        return metric

    assert of(told, 3).compute().item() == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert of(told, 1).compute().item() == pytest.approx((3 / 5 + 0 + 0) / 3)
    elsewhere = told_elsewhere([5, 5, 6], told)
    assert [t[-1].item() for t in elsewhere] == [32, 32, 30]
    assert of(elsewhere, 3).compute().item() == 0.0
    assert all(not len(t) for t in told_elsewhere([5, 5, 5], told))
    assert of(prompts, 3).compute().isnan()  # nothing more was told
    short = Leak(3)
    short.update([torch.tensor([1])], told[:1], prompts[:1])
    assert short.compute().isnan()
    with pytest.raises(ValueError, match="n must be"):
        Leak(4)


def test_signal_metrics_follow_their_definitions() -> None:
    """Token by token in float64, with the gradient of the reverse KL from autograd."""
    draw = torch.Generator().manual_seed(3)
    z, w = torch.randn(2, 64, 6, generator=draw, dtype=torch.float64)
    student, teacher = z.log_softmax(-1), w.log_softmax(-1)
    tokens = torch.multinomial(student.exp(), 1, generator=draw).squeeze(-1)
    ours, theirs, leaks, ascents = [], [], [], []
    for n in range(len(z)):
        p, q, a = student[n].exp(), teacher[n].exp(), int(tokens[n])
        ours.append(sum(float(p[v]) for v in range(6) if q[v] > p[v]))
        theirs.append(sum(float(q[v]) for v in range(6) if q[v] > p[v]))
        if q[a] < p[a]:
            leaks.append(sum(float(p[v]) for v in range(6) if v != a and q[v] < p[v]) / float(1 - p[a]))
        logits = z[n].clone().requires_grad_()
        law = logits.log_softmax(-1)
        (slope,) = torch.autograd.grad((law.exp() * (law - teacher[n])).sum(), logits)
        step = float(teacher[n, a] - student[n, a]) * (torch.eye(6, dtype=torch.float64)[a] - p)
        ascents.append(float(slope @ step > 0))
    cases = [
        (TeacherReach("student"), (student, teacher), ours),
        (TeacherReach("teacher"), (student, teacher), theirs),
        (SuppressionLeak(), (student, teacher, tokens), leaks),
        (AscentShare(), (student, teacher, tokens), ascents),
    ]
    for metric, laws, expected in cases:
        for rows in torch.arange(64).split(20):
            metric.update(*(x[rows] for x in laws))
        assert metric.compute().item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert 0.05 < sum(ascents) / 64 < 0.4 and 10 < len(leaks) < 64
    with pytest.raises(ValueError, match="who='both'"):
        TeacherReach("both")
