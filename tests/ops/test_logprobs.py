import math

import numpy as np
import pytest
import torch

from opd_lightning.ops import logprobs as lp


def test_log_softmax_matches_numpy_at_a_temperature() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    scaled = logits.numpy() / 0.7
    expected = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    np.testing.assert_allclose(lp.log_softmax(logits, 0.7).numpy(), expected, atol=1e-12)


def test_log_softmax_is_float32_for_half_precision() -> None:
    assert lp.log_softmax(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_masked_logits_give_finite_values_and_gradients() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    out = lp.log_softmax(logits)
    (out.exp() * out).sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tail_is_what_the_head_leaves(dtype: torch.dtype) -> None:
    law = torch.tensor([[0.5, 0.3, 0.2]], dtype=dtype).log()
    assert lp.tail_logmass(law[:, :2]).exp().item() == pytest.approx(0.2, rel=1e-5)
    whole = law.clone().requires_grad_(True)
    tail = lp.tail_logmass(whole)
    tail.sum().backward()
    assert tail.exp().item() < 1e-6  # nothing is left
    assert whole.grad.abs().max() == 0.0  # and nothing is pushed


@pytest.mark.parametrize("vocab", [7, 1024, 2000, 4097])
def test_top_k_is_that_of_torch(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    laws = torch.randn(5, vocab, generator=generator)
    laws[0, -1], laws[1] = 9.0, -torch.inf  # behind the last whole group; nothing to choose
    for k in (1, 3, 7):
        values, ids = lp.top_k(laws, k)
        expected = laws.topk(k, -1)
        assert torch.equal(values, expected.values)
        assert torch.equal(laws.gather(-1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())
        assert torch.equal(ids[[0, 2, 3, 4]], expected.indices[[0, 2, 3, 4]])


def test_membership() -> None:
    found = lp.membership(torch.tensor([[0, 3], [2, 1]]), torch.tensor([[3, 4], [0, 4]]), vocab=5)
    assert found.tolist() == [[False, True], [False, False]]


def test_entropy_against_torch_distributions() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(lp.entropy(lp.log_softmax(logits)), expected)
