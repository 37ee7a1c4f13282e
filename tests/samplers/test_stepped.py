"""The C function computes what the decoder in PyTorch computes in float32, as near to float64 as that one comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd_lightning.models import Vocabulary
from opd_lightning.models.lora import base_of
from opd_lightning.samplers import NativeSampler, engines, stepped
from opd_lightning.samplers.decoder import Decoder, Weights
from opd_lightning.samplers.stepped import StepDecoder, computes, library
from tests.samplers import test_decoder
from tests.samplers.test_compiled import (
    assert_no_number_is_told,
    assert_rows_do_not_depend_on_their_batch,
    assert_rows_may_join_as_the_cache_grows,
    assert_steps_at_once_are_steps,
    decoders,
    exactly,
    vocabulary,
    written,
)

__all__ = ["vocabulary"]  # a fixture

MODELS = test_decoder.known(
    vocab_size=77,  # no multiple of four
    hidden_size=60,  # fills no vector
    intermediate_size=39,
    num_attention_heads=10,
    num_key_value_heads=2,  # five queries share a key: four and one
    head_dim=22,
    initializer_range=0.2,
)
builds = pytest.mark.skipif(library() is None, reason="no processor or no compiler for it")


@pytest.fixture(params=["packed", "as they lie"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How they are kept: these models are small enough for packing."""
    if request.param != "packed":
        monkeypatch.setattr(stepped, "SMALL", 0)


def made(name: str, adapter: bool = False) -> Any:
    return (test_decoder.adapted if adapter else test_decoder.made)(MODELS[name])


@builds
@pytest.mark.parametrize(
    ("name", "rows", "adapter"),
    [
        *[(name, 6, False) for name in ("llama", "tied", "biased", "mistral", "qwen2", "qwen3")],
        ("llama", 1, False),
        ("scaled rotary", 20, False),
        ("biased", 9, True),
    ],
)
@pytest.mark.usefixtures("vectors", "weights")
def test_as_near_to_exact_as_the_decoder_in_pytorch(name: str, rows: int, adapter: bool) -> None:
    """Rows of unequal length that come and go; biases, head norms, adapters, sizes that fill no vector."""
    model = made(name, adapter)
    assert computes(base_of(model), torch.float32, vocab=77) and not computes(base_of(model), torch.float32, vocab=3)
    assert not computes(base_of(model), torch.float64, vocab=77)
    exact = exactly(model, rows)
    by_torch, ours = (written(decoders(model, kind, rows, torch.float32), rows) for kind in (Decoder, StepDecoder))
    error, theirs = ((x - exact).square().mean().sqrt() for x in (ours, by_torch))
    assert 0 < error <= 1.3 * theirs
    assert (ours - exact).abs().max() <= 2.0 * (by_torch - exact).abs().max()


@builds
@pytest.mark.usefixtures("vectors", "weights")
def test_a_row_does_not_depend_on_its_batch(vocabulary: Vocabulary) -> None:
    assert_rows_do_not_depend_on_their_batch(made("qwen3"), StepDecoder, vocabulary)


@builds
@pytest.mark.usefixtures("vectors")
def test_nor_behind_short_prompts(vocabulary: Vocabulary) -> None:
    """One of the others is read by PyTorch."""
    prompts = [tuple(range(3 + i, 4 + i + 2 * i)) for i in range(19)] + [(5,) * (stepped.SHORT + 1)]
    assert_rows_do_not_depend_on_their_batch(made("qwen3"), StepDecoder, vocabulary, prompts)


@builds
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_what_other_numbers_are_made_of_does_not_matter(vocabulary: Vocabulary, kind: torch.dtype) -> None:
    """Lightning's precisions change what PyTorch makes by default, in which the functions would read and write amiss."""
    model, prompts = made("llama"), [(5, 6, 7)] * 3
    usual = NativeSampler(max_new_tokens=8).write(model, prompts, [1, 2, 3], vocabulary, 0)
    torch.set_default_dtype(kind)
    try:
        assert usual == NativeSampler(max_new_tokens=8).write(model, prompts, [1, 2, 3], vocabulary, 0)
    finally:
        torch.set_default_dtype(torch.float32)


@builds
def test_it_is_proven_however_a_run_multiplies_float32(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with tiles `medium` rounds the model's own products to bfloat16: what does not would fail."""
    seen: list[str] = []
    deviation = engines._deviation
    monkeypatch.setattr(
        engines, "_deviation", lambda *given: seen.append(torch.get_float32_matmul_precision()) or deviation(*given)
    )
    torch.set_float32_matmul_precision("medium")
    try:
        assert isinstance(engines.engine_for(made("llama"), "auto", vocabulary, [(5, 6)], 1, 4), StepDecoder)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@builds
@pytest.mark.usefixtures("vectors", "weights")
def test_threads_share_weights_or_rows_to_the_same_bits() -> None:
    """With many rows of a small model each thread takes some of them."""
    model, before, found = made("biased"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(written(decoders(model, StepDecoder, 50, torch.float32), 50))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@builds
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("longest", [4, 30, stepped.SHORT - 1, stepped.SHORT + 2])
def test_prompts_are_read_as_by_pytorch(longest: int) -> None:
    """Of one token and of many, some of them alike; several read together, one by one, and by PyTorch if they are long."""
    model = base_of(made("qwen3"))
    kept = Weights(model, torch.float32, packs=False)
    kept.load(model, 77)
    ids = torch.randint(3, 77, (9, longest + 1), generator=torch.Generator().manual_seed(longest)).tolist()
    prompts = [tuple(row[: 1 + max(0, longest - i)]) for i, row in enumerate(ids)]
    prompts[2:4] = prompts[1], prompts[1]
    caches = []
    for kind in (Decoder, StepDecoder):
        decoder = kind(model, kept, 12, longest, longest + 4)
        decoder.admit(prompts)
        decoder.admit(prompts[:3])
        caches.append([torch.cat([c[i, :, :n].flatten() for i, n in enumerate(decoder.lengths)]) for c in decoder.cached])
    for theirs, ours in zip(*caches, strict=True):
        assert theirs.norm() > 1.0
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@builds
@pytest.mark.usefixtures("vectors")
def test_steps_at_once_are_steps(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_steps_at_once_are_steps(made("qwen3"), vocabulary, monkeypatch)


@builds
def test_a_row_that_joins_as_the_cache_grows() -> None:
    assert_rows_may_join_as_the_cache_grows(made("llama"), StepDecoder, torch.float32, 1e-5)


@builds
def test_weights_that_are_not_numbers_are_told(vocabulary: Vocabulary) -> None:
    assert_no_number_is_told(made("llama"), "gate_proj", vocabulary)


@builds
def test_one_token_behind_one_token(vocabulary: Vocabulary) -> None:
    """The smallest cache there is."""
    model = made("llama")
    (told,) = NativeSampler(max_new_tokens=1, temperature=0.0).write(model, [(5,)], [0], vocabulary, 0)
    assert told.ids == (int(model(torch.tensor([[5]])).logits[0, 0, :77].argmax()),)
