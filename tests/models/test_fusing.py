"""Llama-like models compute with fused small operations what they computed before."""

from __future__ import annotations

import copy
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.models.distributions import become_packed, pack_rows
from opd_lightning.models.fusing import LLAMA_LIKE, fuse, split
from opd_lightning.models.loading import hollow_model
from opd_lightning.models.lora import base_of
from opd_lightning.ops.pointwise import library
from tests.samplers import test_decoder

builds = pytest.mark.skipif(library() is None, reason="no processor or no compiler for it")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]])


def run(model: Any) -> list[Tensor]:
    """Logits, then the gradients of all weights."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach().double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative error of each."""
    return [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, wanted, strict=True)]


@builds
@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("adapter", [False, True])
def test_the_same_states_and_gradients(name: str, adapter: bool) -> None:
    """float32 within rounding; bfloat16 as near to float64 as transformers' own; in float64 the same bits, for it is theirs."""
    stock: Any = (test_decoder.adapted if adapter else test_decoder.made)(test_decoder.KNOWN[name])
    fused = copy.deepcopy(stock)
    fuse(base_of(fused))
    kinds = {type(m) for m in fused.modules() if hasattr(type(m), "stock")}
    assert len(kinds) == 3  # norm, feed-forward part and attention
    exact = run(copy.deepcopy(stock).double())
    assert max(errors(run(copy.deepcopy(fused).double()), exact)) == 0
    assert 0 < max(errors(run(copy.deepcopy(fused)), run(stock))) < 1e-5
    ours, theirs = (errors(run(copy.deepcopy(m).bfloat16()), exact) for m in (fused, stock))
    assert ours[0] <= 1.05 * theirs[0]
    assert mean(ours) <= 1.1 * mean(theirs)  # one gradient alone, of eight numbers, may round worse by chance


@builds
def test_a_copy_is_fused_and_what_is_split_is_as_before() -> None:
    model: Any = test_decoder.made(test_decoder.KNOWN["llama"])
    kinds, expected = [type(m) for m in model.modules()], run(model)
    fuse(model)
    fuse(model)
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()] != kinds
    split(model)
    assert [type(m) for m in model.modules()] == kinds and max(errors(run(model), expected)) == 0


def test_other_architectures_are_left_as_they_are() -> None:
    model = test_decoder.Gemma2ForCausalLM(
        test_decoder.Gemma2Config(**{**test_decoder.SIZES, "head_dim": 8, "hidden_activation": "silu"})
    )
    kinds = [type(m) for m in model.modules()]
    fuse(model)
    assert [type(m) for m in model.modules()] == kinds


@builds
def test_a_model_without_weights_becomes_what_another_process_has_proven() -> None:
    proven: Any = test_decoder.made(test_decoder.KNOWN["llama"])
    hollow: Any = hollow_model(proven.config)
    kinds = [type(m) for m in hollow.modules()]
    assert pack_rows(proven)
    become_packed(hollow)
    assert [type(m) for m in hollow.modules()] == [type(m) for m in proven.modules()] != kinds
    assert hollow.config._attn_implementation == proven.config._attn_implementation
