from __future__ import annotations

import pytest
import torch

from opd_lightning.samplers.drawing import BLOCK, CHUNK, SHORT, Law, draw

LARGEST = 1.0 - 2.0**-24  # torch.rand gives no larger float32


def laws(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


@pytest.mark.parametrize("vocab", [7, 1000, SHORT, SHORT + 1, 10 * BLOCK, 5000])
def test_it_inverts_the_cumulative_distribution_in_vocabulary_order(vocab: int) -> None:
    """Against float64; a point within rounding of a step may fall on either side."""
    law, uniform = laws(400, vocab), torch.rand(400, generator=torch.Generator().manual_seed(1))
    running = law.double().cumsum(-1)
    point = uniform[:, None].double() * running[:, -1:]
    expected = torch.searchsorted(running, point, right=True).squeeze(-1)
    drawn = draw(law, uniform)
    distance = (running - point).abs().amin(-1)
    assert bool(((drawn == expected) | (distance < 1e-6)).all())
    assert (drawn == expected).double().mean() > 0.99


@pytest.mark.parametrize("vocab", [200, 1000])
def test_frequencies_of_two_level_draws_follow_the_law(vocab: int) -> None:
    """Chi-square; the seed is fixed, so this does not flicker."""
    count, law = 200_000, laws(1, vocab).clamp(min=1e-3)
    law = law / law.sum()
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(2))
    drawn = torch.cat([draw(law.expand(len(u), -1), u) for u in uniform.split(10_000)])
    expected = law[0].double() * count
    statistic = ((torch.bincount(drawn, minlength=vocab) - expected).square() / expected).sum().item()
    assert abs(statistic - (vocab - 1)) < 4 * (2 * (vocab - 1)) ** 0.5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """At the ends of the unit interval, on the steps, and with most of the vocabulary cut off."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(20):
        law = laws(64, 1000, seed)
        law = law * (torch.rand(law.shape, generator=generator) < 0.02)
        law[:, -300:] = 0.0
        law[:, 500] += 1e-30
        law = law / law.sum(-1, keepdim=True)
        steps = law.cumsum(-1)[:, ::37].T.clamp(max=LARGEST)
        for uniform in (torch.zeros(64), torch.full((64,), LARGEST), *steps):
            assert bool((law.gather(-1, draw(law, uniform)[:, None]) > 0).all())


def test_one_certain_token_is_drawn_whatever_the_number() -> None:
    for place in (0, 255, 256, 999):
        law = torch.zeros(3, 1000)
        law[:, place] = 1e-30
        assert draw(law, torch.tensor([0.0, 0.5, LARGEST])).tolist() == [place] * 3


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.0}], ids=str)
def test_rows_are_drawn_alike_in_every_chunk(settings: dict) -> None:
    vocab = 3000
    rows = 2 * (CHUNK // vocab) + 5
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)).bfloat16() * 3
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    law = Law(**settings)
    tokens, recorded = law.sample(logits, uniform)
    whole = law.probabilities(logits)
    assert torch.equal(tokens, draw(whole, uniform))
    torch.testing.assert_close(recorded, whole.double().gather(-1, tokens[:, None]).squeeze(-1).log().float())
