import pytest
import torch

from opd_lightning.ops.returns import discounted_future


def by_loop(cost: list[float], mask: list[bool], gamma: float) -> list[float]:
    """The definition, over the trainable positions alone."""
    places = [t for t, m in enumerate(mask) if m]
    out = [0.0] * len(cost)
    for i, t in enumerate(places):
        out[t] = sum(gamma ** (j - i) * cost[places[j]] for j in range(i + 1, len(places)))
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
def test_against_the_definition(gamma: float) -> None:
    torch.manual_seed(0)
    cost = torch.randn(6, 9, dtype=torch.float64)
    mask = torch.rand(6, 9) < 0.6
    expected = [by_loop(c, m, gamma) for c, m in zip(cost.tolist(), mask.tolist(), strict=True)]
    torch.testing.assert_close(discounted_future(cost, mask, gamma), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_masked_tokens_pay_nothing_take_nothing_and_cost_no_discount(gamma: float) -> None:
    plain = discounted_future(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool), gamma)
    holes = discounted_future(
        torch.tensor([[7.0, 1.0, float("nan"), 2.0, 9.0, 4.0]]), torch.tensor([[False, True, False, True, False, True]]), gamma
    )
    assert holes[0, [1, 3, 5]].tolist() == plain[0].tolist()
    assert holes[0, [0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
