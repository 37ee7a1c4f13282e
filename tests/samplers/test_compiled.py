"""The C functions compute what the decoder in PyTorch computes in bfloat16, as near to float64 as that one comes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.models import Student, Vocabulary
from opd_lightning.models.lora import base_of
from opd_lightning.samplers import NativeSampler, compiled, native
from opd_lightning.samplers.compiled import CompiledDecoder, computes, library
from opd_lightning.samplers.decoder import GROWTH, Decoder, Weights
from opd_lightning.samplers.drawing import Writing
from opd_lightning.samplers.engines import engine_for
from opd_lightning.samplers.functions import FunctionDecoder
from tests.samplers import test_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 77,  # no multiple of sixteen
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "head_dim": 32,
    "initializer_range": 0.2,
}
MODELS = test_decoder.known(**SIZES)
# six queries share a key: four and two, of 64 numbers and 32
MODELS["wide heads"] = test_decoder.known(**{**SIZES, "head_dim": 96, "num_key_value_heads": 1})["llama"]
NAMES = ("llama", "tied", "biased", "mistral", "qwen2", "qwen3")
builds = pytest.mark.skipif(not compiled.supported() or library() is None, reason="no processor or no compiler for it")


@pytest.fixture(params=["vectors", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the function multiplies: a processor with tiles can do both."""
    tiles = request.param == "tiles"
    if tiles and not compiled.has_tiles():
        pytest.skip("no processor for it")
    monkeypatch.setattr(compiled, "library", partial(library, tiles))


def made(name: str, adapter: bool = False, mixed: bool = False) -> Any:
    model = (test_decoder.adapted if adapter else test_decoder.made)(MODELS[name])
    return model if mixed else model.to(torch.bfloat16)


def written(decoder: Any, rows: int) -> torch.Tensor:
    """(rows, steps, V) logits along fixed texts; rows of unequal length, one of which goes and one joins."""
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 77, (rows, 24), generator=draw).tolist()
    starts = [1 + 3 * (r % 4) for r in range(rows)]
    decoder.admit([tuple(text[:n]) for text, n in zip(texts, starts, strict=True)])
    order, found = list(range(rows)), torch.zeros(rows + 1, 10, 77, dtype=torch.float64)
    texts.append(texts[0])
    starts.append(5)
    done = [0] * (rows + 1)
    for step in range(10):
        if step == 4:
            order = [order[-1], *order[1:-1]] if rows > 1 else order
            decoder.keep(torch.tensor([rows - 1, *range(1, rows - 1)] if rows > 1 else [0]))
            decoder.admit([tuple(texts[rows][: starts[rows]])])
            order.append(rows)
        logits = decoder.step(torch.tensor([texts[r][starts[r] + done[r] - 1] for r in order])).double()
        for i, r in enumerate(order):
            found[r, done[r]] = logits[i]
            done[r] += 1
    return found


def decoders(model: Any, kind: type[Decoder], rows: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    weights = Weights(base_of(model), dtype, kind.packs)
    weights.load(base_of(model), 77)
    return kind(base_of(model), weights, rows + 1, 24, 48)


def exactly(model: Any, rows: int) -> torch.Tensor:
    return written(decoders(copy.deepcopy(model).double(), Decoder, rows, torch.float64), rows)


@builds
@pytest.mark.parametrize(
    ("name", "rows", "adapter"),
    [
        *[(name, 5, False) for name in NAMES],
        ("llama", 1, False),
        ("wide heads", 3, False),
        ("scaled rotary", 20, False),
        ("qwen3", 70, False),
        ("biased", 20, True),
    ],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["whole", "mixed"])
@pytest.mark.usefixtures("way")
def test_as_near_to_exact_as_the_decoder_in_pytorch(name: str, rows: int, adapter: bool, mixed: bool) -> None:
    """Groups of sixteen rows, full and not, and more than four; biases, head norms, adapters; rows that come and go."""
    model = made(name, adapter, mixed)
    assert computes(base_of(model), torch.bfloat16, vocab=77) and not computes(base_of(model), torch.bfloat16, vocab=15)
    exact = exactly(model, rows)
    by_torch = written(decoders(model, Decoder, rows), rows)
    ours = written(decoders(model, CompiledDecoder, rows), rows)
    assert (by_torch - exact).square().mean() > 0
    error, theirs = ((x - exact).square().mean().sqrt() for x in (ours, by_torch))
    assert error <= 1.15 * theirs
    assert (ours - exact).abs().max() <= 1.5 * (by_torch - exact).abs().max()


@pytest.fixture(scope="module")
def vocabulary(pair: tuple[Path, Path]) -> Vocabulary:
    return replace(Vocabulary.of(Student(str(pair[0])).tokenizer()), size=77, eos_ids=(2,))


ONE_TOKEN = [(3 + i,) for i in range(20)]


def assert_rows_do_not_depend_on_their_batch(
    model: Any, kind: type[Decoder], vocabulary: Vocabulary, prompts: Sequence[tuple[int, ...]] = ONE_TOKEN
) -> None:
    """To the bit, beyond the first cache; behind prompts of one token, which nobody reads, or given ones."""
    assert isinstance(engine_for(model, "auto", vocabulary, prompts, 4, 4), kind)
    assert type(engine_for(model, "torch", vocabulary, prompts, 4, 4)) is Decoder
    once, again = (
        NativeSampler(batch_size=size, max_new_tokens=GROWTH + 10).write(model, prompts, list(range(20)), vocabulary, 0)
        for size in (20, 3)
    )
    assert once == again
    assert len({c.ids for c in once}) > 10


@builds
@pytest.mark.usefixtures("way")
def test_a_row_does_not_depend_on_its_batch(vocabulary: Vocabulary) -> None:
    assert_rows_do_not_depend_on_their_batch(made("qwen2"), CompiledDecoder, vocabulary)


def assert_steps_at_once_are_steps(model: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: rows that end and are followed by others, beyond what is left to the function at once and the first cache."""
    prompts, sampler = [(3 + i, *range(i % 3)) for i in range(9)], NativeSampler(batch_size=4, max_new_tokens=GROWTH + 10)
    taken: list[int] = []
    run = FunctionDecoder.run

    def counted(*given: Any) -> Any:
        found = run(*given)
        taken.append(found[0].shape[1])
        return found

    monkeypatch.setattr(native, "AT_ONCE", 5)
    monkeypatch.setattr(FunctionDecoder, "run", counted)
    at_once = sampler.write(model, prompts, list(range(9)), vocabulary, 0)
    monkeypatch.setattr(FunctionDecoder, "run", Writing.run)
    assert at_once == sampler.write(model, prompts, list(range(9)), vocabulary, 0)
    assert max(taken) == 5 > min(taken) and len({len(c.ids) for c in at_once if c.ended}) > 2


@builds
@pytest.mark.usefixtures("way")
def test_steps_at_once_are_steps(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_steps_at_once_are_steps(made("qwen2"), vocabulary, monkeypatch)


def assert_rows_may_join_as_the_cache_grows(model: Any, kind: type[Decoder], dtype: torch.dtype, apart: float) -> None:
    """The cache moves while prompts are read, not in a step."""
    found = []
    for each in (Decoder, kind):
        weights = Weights(base_of(model), dtype, each.packs)
        weights.load(base_of(model), 77)
        decoder = each(base_of(model), weights, 2, 3, 2 * GROWTH)
        decoder.admit([(5, 6, 7)])
        while max(decoder.lengths) < decoder.room:
            decoder.step(torch.tensor([max(decoder.lengths) % 70 + 3]))
        before = decoder.room
        decoder.admit([(8, 9)])
        assert decoder.room > before
        found.append(torch.stack([decoder.step(torch.tensor([i, i + 1])) for i in (4, 5, 6)]).double())
    assert (found[1] - found[0]).square().mean().sqrt() <= apart * found[0].std()


@builds
def test_a_row_that_joins_as_the_cache_grows() -> None:
    assert_rows_may_join_as_the_cache_grows(made("llama"), CompiledDecoder, torch.bfloat16, 0.05)


def assert_no_number_is_told(model: Any, layer: str, vocabulary: Vocabulary) -> None:
    """After one weight of a layer of the feed-forward part became NaN."""
    sampler = NativeSampler(max_new_tokens=4)
    sampler.write(model, [(3, 4)], [0], vocabulary, 0)  # the decoder is proven before
    getattr(model.model.layers[1].mlp, layer).weight.data[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        sampler.write(model, [(3, 4)], [0], vocabulary, 0)


@builds
def test_weights_that_are_not_numbers_are_told(vocabulary: Vocabulary) -> None:
    assert_no_number_is_told(made("llama"), "down_proj", vocabulary)


@builds
def test_one_token_behind_one_token(vocabulary: Vocabulary) -> None:
    """The smallest cache there is."""
    model = made("llama")
    (told,) = NativeSampler(max_new_tokens=1, temperature=0.0).write(model, [(5,)], [0], vocabulary, 0)
    logits = model(torch.tensor([[5]])).logits[0, 0, :77].float()
    assert logits[told.ids[0]] >= logits.max() - 0.1 * logits.std()


@pytest.mark.skipif(not compiled.supported(), reason="no processor for it")
def test_without_a_compiler_the_decoder_in_pytorch_writes(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that fails is told once; none at all is no news."""
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such option: $1 >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    for compiler, told in (("no-compiler-of-this-name", ""), (f"{broken} --strange", "no such option: --strange")):
        monkeypatch.setenv("CC", compiler)
        library.cache_clear()
        try:
            with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
                assert type(engine_for(made("llama"), "auto", vocabulary, [(3,)], 4, 4)) is Decoder
            assert ("could not be built" in caplog.text) == bool(told) and told in caplog.text
        finally:
            library.cache_clear()
    assert not list((tmp_path / "compiled").iterdir())
