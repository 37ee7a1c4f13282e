"""What is exported is the student: the proof, and that it fails for another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from opd_lightning.models import FrozenTeacher, LoRA, NewStudent, Student, Vocabulary
from opd_lightning.models.export import export_student, prove_export
from opd_lightning.models.tiny import pair_tokenizer
from tests.models.test_translation import byte_level

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def adapted(recipe: Student) -> torch.nn.Module:
    """With an adapter that is not zero."""
    model = recipe.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["whole", "adapter"])
@pytest.mark.parametrize("form", [{}, {"merge": True}, {"gguf": True}], ids=str)
def test_every_form_loads_as_the_same_model(lora: Any, form: dict[str, bool], pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Student(str(pair[0]), lora=lora)
    model, vocabulary = adapted(recipe), Vocabulary.of(recipe.tokenizer())
    line = prove_export(model, vocabulary, export_student(model, vocabulary, tmp_path / "out", **form))
    assert "log-probs of 256 random tokens equal the student's" in line and "8 texts give the same tokens" in line


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (LlamaConfig, {"tie_word_embeddings": False}),
        (Qwen2Config, {"tie_word_embeddings": True}),
        (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 128}),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gguf_of_each_architecture(config: Any, extra: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = byte_level([("a", "b"), ("ab", "c")])
    torch.manual_seed(0)
    rows = len(tokenizer) + 3  # a padded vocabulary
    model = AutoModelForCausalLM.from_config(config(vocab_size=rows, initializer_range=0.2, **SIZES, **extra))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "own")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=dtype).eval()  # rotary tables stay in float32
    vocabulary = Vocabulary.of(tokenizer)
    folder = export_student(model, vocabulary, tmp_path, gguf=True)
    assert "(largest difference 0 nat)" in prove_export(model, vocabulary, folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_gguf_is_a_teacher_like_any_other(
    dtype: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    recipe = Student(str(pair[0]), dtype=dtype)
    export_student(recipe.build(), Vocabulary.of(recipe.tokenizer()), tmp_path, gguf=True)
    teacher = FrozenTeacher(str(tmp_path / "model.gguf"))
    teacher.build(recipe.build())
    ids = torch.arange(8)[None]
    ours = recipe.build().eval().float()
    torch.testing.assert_close(teacher.model(input_ids=ids).logits, ours(input_ids=ids).logits)  # type: ignore[misc]


def test_another_model_and_another_tokenizer_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Student(str(pair[0]))
    model, vocabulary = recipe.build(), Vocabulary.of(recipe.tokenizer())
    folder = export_student(model, vocabulary, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is another model: its log-probabilities differ by up to"):
        prove_export(model, vocabulary, folder)
    merged = NewStudent("0123456789+=", pairs="0123456789", hidden=16)
    model, vocabulary = merged.build(), Vocabulary.of(merged.tokenizer())
    folder = export_student(model, vocabulary, tmp_path / "pairs")
    other = merged.tokenizer()
    other.backend_tokenizer.model = pair_tokenizer("0123456789+=", "0123456789").backend_tokenizer.model.__class__(
        merged.tokenizer().get_vocab(), [], unk_token="<unk>"
    )
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="cuts a text differently"):
        prove_export(model, vocabulary, folder)


def test_what_has_no_form_is_refused_before_anything_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import GPT2Config

    tokenizer = Student(str(pair[0])).tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="no GGUF export for gpt2: llama, qwen2, qwen3 are written here"):
        export_student(gpt2, vocabulary, tmp_path / "a", gguf=True)
    scaled = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=40, **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    )
    with pytest.raises(ValueError, match="rotary positions of type 'linear'"):
        export_student(scaled, vocabulary, tmp_path / "a", gguf=True)
    assert not (tmp_path / "a").exists()
    made = Student(str(pair[0]), lora=LoRA(r=2), keep_layers=1)
    model = adapted(made)
    folder = export_student(model, vocabulary, tmp_path / "adapter")
    with pytest.raises(ValueError, match="xport with --merge true"):
        prove_export(model, vocabulary, folder)
