"""Packed rows give the states and gradients of padded ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from opd_lightning.models import AdapterOffTeacher, LoRA, StartTeacher, Student
from opd_lightning.models import attention as attention_module
from opd_lightning.models.attention import NAME, line_states
from opd_lightning.models.distributions import laws_of, likeliest, pack_rows
from opd_lightning.models.packing import Layout, lay_out
from opd_lightning.types import Rendering

GROUP = list(range(5, 17)) * 4  # a prompt of 48 tokens
SHAPES = {
    "unequal": ([GROUP[:9], GROUP[3:7], GROUP[1:30]], [GROUP[:4], GROUP[2:11], GROUP[5:6]]),
    "equal": ([GROUP[:9], GROUP[3:12]], [GROUP[:4], GROUP[5:9]]),
    "group": ([GROUP] * 4, [GROUP[:4], GROUP[2:11], GROUP[5:6], GROUP[:4]]),  # two rows are the same
    "preamble": ([GROUP, [*GROUP, *GROUP[7:30]], [*GROUP, *GROUP[7:30]], GROUP[::-1]], [GROUP[i : i + 5] for i in range(4)]),
    "one token": ([GROUP, GROUP], [[4], [5]]),
    "a row without completion": ([GROUP, GROUP, GROUP[4:9]], [[], GROUP[:3], GROUP[:6]]),
    "nothing": ([GROUP, GROUP[4:9]], [[], []]),
}
SIZES: dict[str, Any] = {
    "vocab_size": 22,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def rendering(shape: str) -> Rendering:
    return Rendering.of(*SHAPES[shape], pad_id=0)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def row_by_row(model: Any, text: Rendering) -> Tensor:
    """The reference: every row alone, as transformers computes it."""
    decoder = model.get_decoder()
    rows = zip(text.ids, text.lengths.tolist(), text.mask, strict=True)
    states = [decoder(input_ids=ids[None, :n]).last_hidden_state[0, :-1][mask[: n - 1]] for ids, n, mask in rows]
    return torch.cat(states)


def gradients(model: nn.Module, states: Tensor) -> list[Tensor]:
    model.zero_grad()
    weight = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * weight).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: Tensor | list[Tensor], b: Tensor | list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- the layout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("worth", [1, 32, None])
def test_a_layout_holds_every_row_up_to_its_last_scored_position(shape: str, worth: int | None) -> None:
    text = rendering(shape)
    layout = lay_out(text, worth)
    stop = [call.span[1] for call in layout.calls]
    assert [call.span[0] for call in layout.calls] == [0, *stop[:-1]] and stop[-1] == layout.ids.shape[1]
    rows, columns = text.mask.nonzero(as_tuple=True)
    assert torch.equal(layout.ids[0, layout.scored], text.ids[rows, columns])
    assert torch.equal(layout.positions[0, layout.scored], columns)


def test_a_shared_prompt_stands_once() -> None:
    assert (
        lay_out(rendering("group")).ids.shape[1] == 47 + 4 + 9 + 1 + 4 - 3
    )  # each row but the one-token one adds n - 1 tokens
    assert lay_out(rendering("group"), None).ids.shape[1] == 4 * 47 + 4 + 9 + 1 + 4


def test_a_preamble_is_shared_below_which_groups_share_their_prompt() -> None:
    depths = [len(call.context) for call in lay_out(rendering("preamble"), 8).calls]
    assert max(depths) == 2


# ---- states and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("full_enough", "multiple"), [(1.0, 1), (0.0, 64)], ids=["one length a call", "padded calls"])
def test_states_and_gradients_in_float64(shape: str, full_enough: float, multiple: int) -> None:
    model, text = llama().double(), rendering(shape)
    expected = row_by_row(model, text)
    wanted = gradients(model, expected) if len(expected) else []
    assert pack_rows(model)
    layout = lay_out(text, full_enough=full_enough, multiple=multiple)
    assert layout.ids.shape[1] % multiple == 0
    found = line_states(model.get_decoder(), layout)
    same(found, expected, 1e-6)  # the norms of transformers' Llama round to float32
    if wanted:
        same(gradients(model, found), wanted, 1e-5)
    else:
        assert found.shape == (0, 16) and found.requires_grad


@pytest.mark.parametrize("shape", ["unequal", "group", "preamble"])
@pytest.mark.parametrize("full_enough", [1.0, 0.0], ids=["one length a call", "padded calls"])
def test_attention_alone_is_exact_in_float64(shape: str, full_enough: float) -> None:
    text = rendering(shape)
    layout = lay_out(text, full_enough=full_enough)
    torch.manual_seed(1)
    line = [torch.randn(1, layout.ids.shape[1], heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    module = nn.Module()
    found, _ = attention_module.attention(module, *(x.transpose(1, 2) for x in line), None, scaling=0.3, opd_layout=layout)
    visible = torch.zeros(layout.ids.shape[1], layout.ids.shape[1], dtype=torch.bool)
    for call in layout.calls:  # who may look where, from the definition of a layout
        before = [i for begin, stop in call.context for i in range(begin, stop)]
        start = call.span[0]
        while start < call.span[1]:
            restarts = (layout.positions[0, start + 1 : call.span[1]] <= layout.positions[0, start]).nonzero()
            end = start + 1 + int(restarts[0]) if len(restarts) else call.span[1]
            for i in range(start, end):
                visible[i, [*before, *range(start, i + 1)]] = True
            start = end
    q, k, v = (x[0].transpose(0, 1) for x in line)
    scores = (q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.3).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1)[None]
    same(found, expected, 1e-12)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), line)
    same(list(torch.autograd.grad((found * weight).sum(), line)), list(wanted), 1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_students_of_every_kind(pair: tuple[Path, Path], lora: LoRA | None, checkpointing: bool) -> None:
    student = Student(str(pair[0]), lora=lora, gradient_checkpointing=checkpointing).build()
    if lora:
        for name, p in student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    text = rendering("group")
    expected = laws_of(student, text, 22).hidden
    wanted = gradients(student, expected)
    assert pack_rows(student)
    found = laws_of(student, text, 22).hidden
    same(found, expected, 1e-5)
    same(gradients(student, found), wanted, 1e-4)


def test_bfloat16_is_as_near_to_float64_as_the_padded_forward_is() -> None:
    exact = llama()
    model, text = copy.deepcopy(exact).bfloat16(), rendering("group")
    exact = exact.double()
    truth = row_by_row(exact, text)
    right = gradients(exact, truth)

    def errors() -> tuple[float, float]:
        states = laws_of(model, text, 22).hidden
        slopes = gradients(model, states)
        off = torch.cat([(a.double() - b).flatten() for a, b in zip(slopes, right, strict=True)]).norm()
        return float((states.detach() - truth.detach()).norm() / truth.detach().norm()), float(
            off / torch.cat([b.flatten() for b in right]).norm()
        )

    padded = errors()
    assert pack_rows(model)
    packed = errors()
    assert packed[0] <= 1.5 * padded[0] and packed[1] <= 1.5 * padded[1]
    assert padded[0] > 0


def test_other_architectures_pack_or_stay_padded() -> None:
    torch.manual_seed(0)
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=22, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))
    soft = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))  # attention soft-cap
    deaf = StableLmForCausalLM(StableLmConfig(**SIZES))  # keeps keywords from its attention
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))  # a convolution would cross rows
    for model, packs in ((qwen, True), (gpt2, True), (soft, False), (deaf, False), (hybrid, False)):
        model = model.eval()
        text, before = rendering("group"), model.get_decoder().config._attn_implementation
        expected = row_by_row(model, text)
        assert pack_rows(model) is packs, type(model).__name__
        assert model.get_decoder().config._attn_implementation == (NAME if packs else before)
        same(laws_of(model, text, 22).hidden, expected, 1e-4)


def test_rows_longer_than_a_window_are_scored_padded() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20)).eval()
    assert pack_rows(model)
    for shape in ("equal", "group"):  # 13 tokens, 57 tokens
        same(laws_of(model, rendering(shape), 22).hidden, row_by_row(model, rendering(shape)), 1e-4)


# ---- what packing must leave alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["adapter", "attention"])
def test_rows_of_a_group_draw_their_own_dropout(pair: tuple[Path, Path], source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student(str(pair[0]), lora=LoRA(r=4, dropout=0.5) if source == "adapter" else None).build()
    if source == "attention":
        student.config.attention_dropout = 0.5
        for layer in student.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.5
    pack_rows(student)
    lengths = []

    def seen(text: Rendering, worth_sharing: int | None, *rest: Any) -> Layout:
        lengths.append(lay_out(text, worth_sharing).ids.shape[1])
        return lay_out(text, worth_sharing, *rest)

    monkeypatch.setattr(attention_module, "lay_out", seen)
    laws_of(student, rendering("group"), 22).hidden.sum().backward()
    laws_of(student.eval(), rendering("group"), 22)
    assert lengths[0] == 4 * 47 + 18 and lengths[1] < 80


def test_student_and_teacher_share_a_layout(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the teacher is asked first, inside of inference mode: the student's graph holds what was made there."""
    models = [Student(str(folder)).build() for folder in pair]
    for model in models:
        pack_rows(model)
    made = []
    monkeypatch.setattr(attention_module, "lay_out", lambda *given: made.append(lay_out(*given)) or made[-1])
    text = rendering("group")
    with torch.inference_mode():
        laws_of(models[1], text, 22)
    laws_of(models[0], text, 22).hidden.sum().backward()
    assert len(made) == 1
    laws_of(models[0], rendering("group"), 22)
    assert len(made) == 2


def test_self_teachers_pack_as_their_student_does(pair: tuple[Path, Path]) -> None:
    text = rendering("group")
    student = Student(str(pair[0]), lora=LoRA(r=4)).build()
    expected = AdapterOffTeacher().laws(student, text, 22).hidden
    start = StartTeacher()
    start.build(student)
    pack_rows(student)
    pack_rows(start.own_model())
    same(AdapterOffTeacher().laws(student, text, 22).hidden, expected, 1e-5)
    same(start.laws(student, text, 22).hidden, expected, 1e-5)


def test_a_packing_model_still_generates_and_is_saved_as_any_other(tmp_path: Path) -> None:
    model = llama().eval()
    prompt = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    keys = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **keys)
    assert pack_rows(model)
    assert torch.equal(model.generate(prompt, **keys), expected)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_nothing_is_ranked_where_nothing_was_written() -> None:
    student = Student("zoo/addition/student").build().eval()
    text = Rendering.of([(3, 4), (3,)], [(), (5, 6)], 0)
    assert likeliest(student, text, 10, 3, rows=1).count_nonzero(dim=(1, 2)).tolist()[0] == 0
