from __future__ import annotations

import itertools

import pytest
import torch

from opd_lightning.metrics import (
    EntropyGap,
    ExactMatch,
    NumberMatch,
    OverlapAdvantage,
    OverlapMass,
    PassAtK,
    RegexMatch,
    TokenMean,
    TopKOverlap,
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
    assert NumberMatch()({"answer": "#### 1,200"}, "it costs 1200 dollars, or 1,200.00") == 1.0
    assert NumberMatch()({"answer": 3}, "no number") == 0.0
    assert RegexMatch(r"^Note:")({}, "Note: x") == 1.0
    with pytest.raises(ValueError, match="RegexMatch"):
        RegexMatch("(")
    with pytest.raises(KeyError, match="column 'answer'"):
        ExactMatch()({"gold": 1}, "1")
