from __future__ import annotations

import pytest
import torch

from opd_lightning.samplers.drawing import BLOCK, CHUNK, SHORT, Law, draw, library

LONG = SHORT + 952
"""A vocabulary whose sum has two levels, the last block not full."""

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


@pytest.mark.parametrize("vocab", [200, SHORT + 1])
def test_frequencies_of_two_level_draws_follow_the_law(vocab: int) -> None:
    """Chi-square; the seed is fixed, so this does not flicker."""
    count, law = 200_000, laws(1, vocab).clamp(min=1e-3)
    law = law / law.sum()
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(2))
    drawn = torch.cat([draw(law.expand(len(u), -1), u) for u in uniform.split(5_000)])
    expected = law[0].double() * count
    statistic = ((torch.bincount(drawn, minlength=vocab) - expected).square() / expected).sum().item()
    assert abs(statistic - (vocab - 1)) < 4 * (2 * (vocab - 1)) ** 0.5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """At the ends of the unit interval, on the steps, and with most of the vocabulary cut off."""
    generator = torch.Generator().manual_seed(3)
    for seed in range(20):
        law = laws(64, LONG, seed)
        law = law * (torch.rand(law.shape, generator=generator) < 0.02)
        law[:, -300:] = 0.0
        law[:, 500] += 1e-30
        law = law / law.sum(-1, keepdim=True)
        steps = law.cumsum(-1)[:, ::97].T.clamp(max=LARGEST)
        for uniform in (torch.zeros(64), torch.full((64,), LARGEST), *steps):
            assert bool((law.gather(-1, draw(law, uniform)[:, None]) > 0).all())


def test_one_certain_token_is_drawn_whatever_the_number() -> None:
    for place in (0, 255, 256, LONG - 1):
        law = torch.zeros(3, LONG)
        law[:, place] = 1e-30
        assert draw(law, torch.tensor([0.0, 0.5, LARGEST])).tolist() == [place] * 3


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.0}], ids=str)
def test_rows_are_drawn_alike_in_every_chunk(settings: dict) -> None:
    vocab = 3000
    rows = 2 * (CHUNK // vocab) + 5
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)).bfloat16() * 3
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    law = Law(**settings, functions=False)
    tokens, recorded = law.sample(logits, uniform)
    whole = law.probabilities(logits)
    assert torch.equal(tokens, draw(whole, uniform))
    torch.testing.assert_close(recorded, whole.double().gather(-1, tokens[:, None]).squeeze(-1).log().float())


# ---- by a C function ---------------------------------------------------------------------------------------------------


builds = pytest.mark.skipif(library() is None, reason="no processor or no compiler for it")


@builds
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "temperature"), [(LONG, 1.0), (LONG, 0.7), (21, 1.0), (512, 0.7)])
def test_the_function_draws_what_pytorch_draws(dtype: torch.dtype, vocab: int, temperature: float) -> None:
    """Against float64, cut off entries among them, rows cut from longer ones; a point near a step may fall beside it."""
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(300, vocab + 40, generator=generator) * 4).to(dtype)[:, :vocab]
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
    uniform = torch.rand(300, generator=generator)
    uniform[:2] = torch.tensor([0.0, LARGEST])
    tokens, recorded = Law(temperature).sample(logits, uniform)
    exact = (logits.double() / temperature).log_softmax(-1)
    running = exact.exp().cumsum(-1)
    expected = torch.searchsorted(running, uniform[:, None].double() * running[:, -1:], right=True).squeeze(-1)
    distance = (running - uniform[:, None]).abs().amin(-1)
    assert bool(((tokens == expected) | (distance < 1e-6)).all()) and (tokens == expected).double().mean() > 0.98
    torch.testing.assert_close(recorded.double(), exact.gather(-1, tokens[:, None]).squeeze(-1), atol=3e-6, rtol=1e-6)


@builds
@pytest.mark.usefixtures("vectors")
def test_the_function_never_draws_what_has_no_mass_and_tells_what_is_not_a_number() -> None:
    logits = torch.full((4, LONG), -torch.inf)
    logits[0, LONG - 1] = logits[1, 0] = logits[2, 256] = 5.0
    logits[2, 255] = -200.0
    logits[3] = torch.nan
    for point in (0.0, 0.5, LARGEST):
        tokens, recorded = Law().sample(logits, torch.full((4,), point))
        assert tokens[:3].tolist() == [LONG - 1, 0, 256] and recorded[:3].tolist() == [0.0] * 3
        assert bool(recorded[3].isnan()) and 0 <= int(tokens[3]) < LONG


@builds
@pytest.mark.parametrize("vocab", [21, SHORT + 1])
def test_frequencies_of_the_function_follow_the_law(vocab: int) -> None:
    count, law = 100_000, laws(1, vocab).clamp(min=1e-3)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(7))
    logits = law.log().expand(5_000, -1)
    drawn = torch.cat([Law().sample(logits, u)[0] for u in uniform.split(5_000)])
    expected = (law[0] / law.sum()).double() * count
    statistic = ((torch.bincount(drawn, minlength=vocab) - expected).square() / expected).sum().item()
    assert abs(statistic - (vocab - 1)) < 4 * (2 * (vocab - 1)) ** 0.5
