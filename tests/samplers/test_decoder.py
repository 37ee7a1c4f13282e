"""The decoder writes what the model's own forward pass writes, for every architecture it claims to know."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_lightning.models import AdapterOffTeacher, LoRA, Student, Vocabulary
from opd_lightning.models.distributions import laws_of
from opd_lightning.models.lora import LinearParts, add_lora
from opd_lightning.samplers import NativeSampler
from opd_lightning.samplers.decoder import GROWTH, Decoder
from opd_lightning.samplers.engines import TransformersEngine, engine_for
from opd_lightning.samplers.linear import PACK_FLOAT32, PIECE, Linear
from opd_lightning.types import Completion, Prompt, Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def known(**other: Any) -> dict[str, Any]:
    """Builders of every architecture that the decoder knows, of these sizes but for others."""
    sizes = {**SIZES, **other}
    headed = {"head_dim": 16, **sizes}
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
        "biased": lambda: LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)),
        "scaled rotary": lambda: LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=LLAMA3)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**headed, sliding_window=None)),
        "wide window": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=4096)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**headed)),
    }


KNOWN = known()
PROMPTS = [tuple(range(3, 4 + n)) for n in (5, 1, 9, 5, 2)] * 4  # each four times, of unequal length
SEEDS = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def vocabulary(pair: tuple[Path, Path]) -> Vocabulary:
    return replace(Vocabulary.of(Student(str(pair[0])).tokenizer()), size=30)


def made(build: Any) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: torch.nn.Module = build()
        for name, p in model.named_parameters():  # biases and norms are born as constants
            if p.ndim == 1:
                p.data += 0.3 * torch.randn(p.shape)
            assert p.std() > 0, name
    return model.eval()


def both(model: torch.nn.Module, vocabulary: Vocabulary, prompts: Any = PROMPTS, **settings: Any) -> list[list[Completion]]:
    """What the decoders write, in PyTorch and in C, and what transformers' forward pass writes from the same numbers."""
    with torch.no_grad():
        for kind in ("torch", "auto"):
            assert isinstance(engine_for(model, kind, vocabulary, prompts, 4, 4), Decoder)
    seeds = SEEDS[: len(prompts)]
    settings = {"max_new_tokens": 20, **settings}
    kinds = ("torch", "auto", "transformers")
    return [NativeSampler(**settings, engine=kind).write(model, prompts, seeds, vocabulary, 0) for kind in kinds]


def assert_same(written: list[list[Completion]], atol: float = 4e-5) -> None:
    *decoders, theirs = written
    for ours in decoders:
        assert [c.ids for c in ours] == [c.ids for c in theirs]
        assert [c.ended for c in ours] == [c.ended for c in theirs]
        mine, other = (torch.tensor([p for c in side for p in c.logprobs]) for side in (ours, theirs))
        torch.testing.assert_close(mine, other, atol=atol, rtol=0.0)


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures(name: str, vocabulary: Vocabulary) -> None:
    written = both(made(KNOWN[name]), vocabulary)
    assert_same(written)
    assert len({c.ids for c in written[0]}) > 10


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_rows_that_come_and_go(batch_size: int, vocabulary: Vocabulary) -> None:
    """Groups cut by a batch's edge, rows that join while others are being written, gaps that are closed."""
    assert_same(both(made(KNOWN["llama"]), vocabulary, batch_size=batch_size))


def test_rows_longer_than_the_first_cache(vocabulary: Vocabulary) -> None:
    endless = replace(vocabulary, eos_ids=(-1,))
    written = both(made(KNOWN["tied"]), endless, prompts=PROMPTS[:3], max_new_tokens=2 * GROWTH + 30)
    assert {len(c.ids) for c in written[0]} == {2 * GROWTH + 30}
    assert_same(written, atol=1e-4)


def test_greedy_and_truncated_laws(vocabulary: Vocabulary) -> None:
    for settings in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5, "temperature": 1.3}):
        assert_same(both(made(KNOWN["qwen3"]), vocabulary, **settings))


def packed_llama() -> torch.nn.Module:
    """Wide enough for packed float32 layers and a head of two pieces."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 640, "num_hidden_layers": 1, "vocab_size": 9000}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.05}))


def test_weights_are_read_anew_for_every_write(vocabulary: Vocabulary) -> None:
    """After an update in place, with layers that oneDNN packs and plain ones; padding rows of the head are cut."""
    assert PACK_FLOAT32 <= 512 * 512 and PIECE // 512 < 8900
    for build, size in ((packed_llama, 8900), (KNOWN["biased"], 30)):
        model, cut = made(build), replace(vocabulary, size=size)
        before = both(model, cut)
        assert_same(before)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        after = both(model, cut)
        assert_same(after)
        assert before[0] != after[0]
        assert max(t for c in before[0] for t in c.ids) < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_layers(dtype: torch.dtype) -> None:
    """Packed or plain, with and without bias, refilled: the products of the single layers side by side."""
    layer, generator = Linear(dtype), torch.Generator().manual_seed(0)
    for width in (16, 600):
        layer = Linear(dtype)
        for _ in range(2):
            weights = [torch.randn(n, width, generator=generator).to(dtype) for n in (500, 40, 8)]
            biases = [torch.randn(500, generator=generator).to(dtype), None, torch.randn(8, generator=generator).to(dtype)]
            a, b = torch.randn(3, width, generator=generator), torch.randn(40, 3, generator=generator)
            adapters = [(), ((a, b, 0.5), (a.flip(0), b, 0.25)), ()]
            layer.load([LinearParts(*part) for part in zip(weights, biases, adapters, strict=True)])
            x = torch.randn(5, width, generator=generator).to(dtype)
            expected = [
                F.linear(x.double(), w.double(), None if c is None else c.double())
                for w, c in zip(weights, biases, strict=True)
            ]
            expected[1] += x.double() @ (0.5 * b @ a + 0.25 * b @ a.flip(0)).double().T
            error = 8 * torch.finfo(dtype).eps * width**0.5
            torch.testing.assert_close(layer(x).double(), torch.cat(expected, -1), atol=error, rtol=error)


def test_a_young_adapter_is_not_rounded_away() -> None:
    """Every entry of the adapter's product is below half a step of the bfloat16 weight that merging would add it to."""
    weight, x = torch.ones(4, 512).bfloat16(), torch.ones(2, 512).bfloat16()
    weight[:, ::2] = -1.0  # the base gives 0
    parts = LinearParts(weight, None, ((torch.ones(1, 512), torch.full((4, 1), 1e-3), 1.0),))
    assert torch.equal(parts.merged(), weight)
    layer = Linear(torch.bfloat16)
    layer.load([parts])
    torch.testing.assert_close(layer(x).float(), torch.full((2, 4), 0.512), atol=2e-3, rtol=0.0)


# ---- adapters ------------------------------------------------------------------------------------------------------------
def test_the_first_write_may_stand_in_inference_mode(vocabulary: Vocabulary) -> None:
    model, sampler = made(KNOWN["llama"]), NativeSampler(max_new_tokens=4)
    with torch.inference_mode():
        first = sampler.write(model, PROMPTS, SEEDS, vocabulary, 0)
    assert [c.ids for c in sampler.write(model, PROMPTS, SEEDS, vocabulary, 0)] == [c.ids for c in first]


def test_rows_beyond_the_window_do_not_condemn_shorter_ones() -> None:
    model = made(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    words: Any = SimpleNamespace(size=30, pad_id=0)
    with torch.no_grad():
        found = [isinstance(engine_for(model, "auto", words, [(3, 4)], 1, new), Decoder) for new in (4, 40, 4)]
    assert found == [True, False, True]


def adapted(build: Any = KNOWN["llama"]) -> Any:
    model: Any = add_lora(made(build), LoRA(r=4), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def test_adapters_are_added_and_left_out_as_the_model_does(vocabulary: Vocabulary) -> None:
    model = adapted()
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    student = both(model, vocabulary)
    assert_same(student)
    with AdapterOffTeacher().speaking(model) as teacher:
        off = both(teacher, vocabulary)
    assert_same(off)
    assert off[0] != student[0]
    assert both(model, vocabulary)[0] == student[0]
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    model.merge_adapter()
    assert [c.ids for c in both(model, vocabulary)[0]] == [c.ids for c in student[0]]


# ---- models that are left to transformers ------------------------------------------------------------------------------------
def gemma() -> torch.nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "head_dim": 8}, final_logit_softcapping=5.0))


def doubled() -> torch.nn.Module:
    """A llama by its parts, whose head does something else."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head.register_forward_hook(lambda module, args, out: 2.0 * out)
    return model


def dora() -> torch.nn.Module:
    config = LoraConfig(r=2, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)  # type: ignore[return-value]


UNKNOWN = {
    "gemma2": (gemma, "model_type 'gemma2'"),
    "another head": (doubled, "its logits differ by"),
    "short window": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding window of 8"),
    "dynamic rotary": (
        lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        ),
        "rope_type 'dynamic'",
    ),
    "dora": (dora, "projection Linear"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_models_are_written_by_transformers(
    name: str, vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    build, reason = UNKNOWN[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        written = [
            NativeSampler(max_new_tokens=12, engine=e).write(model, PROMPTS, SEEDS, vocabulary, 0)
            for e in ("auto", "auto", "transformers")
        ]
    assert written[0] == written[1] == written[2]
    assert caplog.text.count("is run by transformers") == 1 and reason in caplog.text
    with torch.no_grad():
        assert isinstance(engine_for(model, "auto", vocabulary, PROMPTS, 4, 12), TransformersEngine)


# ---- recorded log-probabilities against the training forward -----------------------------------------------------------------
def deviation(model: torch.nn.Module, vocabulary: Vocabulary) -> torch.Tensor:
    written = NativeSampler(max_new_tokens=20).write(model, PROMPTS, SEEDS, vocabulary, 0)
    rollout = Rollout.of([Prompt(0, "", p) for p in PROMPTS], written, vocabulary.pad_id)
    laws = laws_of(model, rollout.text, vocabulary.size)
    scored = laws.logits(0, len(laws)).float().log_softmax(-1)
    scored = scored.gather(-1, rollout.text.targets[rollout.mask][:, None]).squeeze(-1)
    return (rollout.sampler_logprobs[rollout.mask] - scored).detach().abs()


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("dtype", "mean", "largest"), [("float32", 2e-6, 5e-5), ("bfloat16", 0.005, 0.15), ("mixed", 0.005, 0.15)]
)
def test_recorded_logprobs_agree_with_scoring(zoo_model: Any, dtype: str, mean: float, largest: float, adapter: bool) -> None:
    """The tolerances that the docstring of the sampler states, in nats, on a trained model."""
    model, vocabulary = zoo_model(dtype.replace("mixed", "float32"), adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
        found = deviation(model, vocabulary)
    print(dtype, adapter, found.mean().item(), found.max().item())
    assert len(found) > 100
    assert found.mean() < mean and found.max() < largest


@pytest.fixture(scope="module")
def zoo_model() -> Any:
    def build(dtype: str, adapter: bool) -> tuple[torch.nn.Module, Vocabulary]:
        student = Student("zoo/addition/student", dtype=dtype, lora=LoRA(r=4) if adapter else None)
        model = student.build().eval()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        return model, Vocabulary.of(student.tokenizer())

    return build
