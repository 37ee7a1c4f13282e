from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from opd_lightning.models import AdapterOffTeacher, FrozenTeacher, LoRA, NewStudent, Student, Vocabulary, VocabularyMismatch
from opd_lightning.models.distributions import head_of, laws_of, prove_head
from opd_lightning.models.loading import load_model, resolve
from opd_lightning.models.students import kept_layers, prune_layers
from opd_lightning.models.tiny import save_tiny
from opd_lightning.models.vocabulary import prove_rows, prove_same_tokens, special_differences
from opd_lightning.types import Rendering

TEXT = Rendering.of([(1, 5, 6), (1, 7)], [(8, 9, 2), (4, 2)], pad_id=0)


def test_laws_are_the_models_own_logits_at_completion_positions(pair: tuple[Path, Path]) -> None:
    model = Student(str(pair[0])).build().eval()
    laws = laws_of(model, TEXT, vocab=22)
    for row, positions, start in ((0, [2, 3, 4], 0), (1, [1, 2], 3)):
        alone = model(input_ids=TEXT.ids[row : row + 1, : TEXT.lengths[row]]).logits[0, positions]
        torch.testing.assert_close(laws.logits(start, start + len(positions)), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                final_logit_softcapping=0.3,
            )
        ),
        CohereForCausalLM(
            CohereConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                logit_scale=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
    ],
    ids=["soft-capped", "scaled"],
)
def test_heads_that_transform_their_logits(model: torch.nn.Module) -> None:
    prove_head(model.eval())
    hidden = model.get_decoder()(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    torch.testing.assert_close(head_of(model)(hidden), model(input_ids=torch.tensor([[1, 2, 3]])).logits)


def test_a_head_that_does_something_unknown_is_refused() -> None:
    model = NewStudent("01", hidden=16, layers=1, heads=2).weights().eval()
    inner = model.forward
    model.forward = lambda *a, **k: (lambda out: setattr(out, "logits", out.logits * 3 + 1) or out)(inner(*a, **k))
    with pytest.raises(ValueError, match="transforms its logits"):
        prove_head(model)


# ---- teachers ---------------------------------------------------------------------------------------------------------------


def test_the_adapter_off_teacher_is_the_base_model_bit_for_bit(pair: tuple[Path, Path]) -> None:
    student = Student(str(pair[0]), lora=LoRA(r=4, dropout=0.5)).build()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_()
    base = load_model(str(pair[0]))
    theirs = AdapterOffTeacher().laws(student, TEXT, 22)
    with torch.no_grad():
        expected = laws_of(base, TEXT, 22)
        assert torch.equal(theirs.logits(0, len(theirs)), expected.logits(0, len(expected)))
    assert student.training  # dropout is back on
    assert (laws_of(student, TEXT, 22).logits(0, 5) - theirs.logits(0, 5)).abs().max() > 1e-3


def test_a_teacher_pass_between_forward_and_backward_keeps_the_gradients(pair: tuple[Path, Path]) -> None:
    def gradients(ask_teacher: bool) -> list[torch.Tensor]:
        student = Student(str(pair[0]), lora=LoRA(r=4)).build()
        loss = laws_of(student, TEXT, 22).logits(0, 5).square().sum()
        if ask_teacher:
            AdapterOffTeacher().laws(student, TEXT, 22).logits(0, 5)
        loss.backward()
        return [p.grad for p in student.parameters() if p.requires_grad]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["frozen", "adapter_off"])
def test_teachers_give_no_gradient_and_no_parameters(pair: tuple[Path, Path], kind: str) -> None:
    student = Student(str(pair[0]), lora=LoRA(r=4)).build()
    teacher = FrozenTeacher(str(pair[1])) if kind == "frozen" else AdapterOffTeacher()
    teacher.build(student)
    laws = teacher.laws(student, TEXT, 22)
    assert not laws.logits(0, 5).requires_grad
    assert not isinstance(teacher, torch.nn.Module)


def test_adapter_off_needs_an_adapter(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.student\.lora"):
        AdapterOffTeacher().check(Student(str(pair[0])))


# ---- students ---------------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_only_and_starts_equal_on_every_rank(pair: tuple[Path, Path]) -> None:
    a, b = (Student(str(pair[0]), lora=LoRA(r=4)).build() for _ in range(2))
    trained = {n: p for n, p in a.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert all(torch.equal(p, dict(b.named_parameters())[n]) for n, p in trained.items())


def test_unknown_lora_targets_list_the_layers(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="q_proj"):
        Student(str(pair[0]), lora=LoRA(target_modules=["query"])).build()


def test_gradient_checkpointing_gives_the_same_gradients(pair: tuple[Path, Path]) -> None:
    found = []
    for on in (False, True):
        student = Student(str(pair[0]), gradient_checkpointing=on).build()
        laws_of(student, TEXT, 22).logits(0, 5).square().sum().backward()
        found.append([p.grad.clone() for p in student.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_pruning_keeps_the_chosen_layers_and_still_generates(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "deep", hidden=16, layers=5, heads=2)
    whole, pruned = load_model(str(folder)), Student(str(folder), keep_layers=3).build().eval()
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 3
    for new, old in zip(pruned.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(new.mlp.up_proj.weight, whole.model.layers[old].mlp.up_proj.weight)
    ids = torch.tensor([[1, 5, 6]])
    cached = pruned.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = ids
    for _ in range(cached.shape[1] - 3):
        plain = torch.cat([plain, pruned(input_ids=plain).logits[:, -1:].argmax(-1)], -1)
    assert torch.equal(cached, plain)  # cache indices follow the new numbering
    pruned.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.num_hidden_layers == 3


@pytest.mark.parametrize("keep", [0, 9, [], [2, 1], [0, 7]])
def test_impossible_prunings_are_named(keep: int | list[int]) -> None:
    with pytest.raises(ValueError, match="keep_layers"):
        kept_layers(5, keep)


def test_pruning_needs_a_list_of_layers() -> None:
    class Odd(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return self

    with pytest.raises(ValueError, match="no plain list"):
        prune_layers(Odd(), 1)


# ---- vocabularies and paths -------------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused_with_the_differing_ids(tmp_path: Path) -> None:
    a, b = (NewStudent(characters).tokenizer() for characters in ("0123", "0132"))
    with pytest.raises(VocabularyMismatch) as caught:
        prove_same_tokens(a, b)
    assert "2 of 8 ids differ" in str(caught.value)
    assert "id 6: student '2', teacher '3'" in str(caught.value)


def test_padded_vocabularies_are_accepted_with_a_proof() -> None:
    vocabulary = Vocabulary.of(NewStudent("0123").tokenizer())
    assert vocabulary.size == 8
    line = prove_rows(vocabulary, {"student": 8, "teacher": 64})
    assert "56 of the teacher" in line
    with pytest.raises(VocabularyMismatch, match=r"model\.student\.path"):
        prove_rows(vocabulary, {"student": 7})


def test_padded_rows_carry_no_mass(pair: tuple[Path, Path]) -> None:
    model = Student(str(pair[0])).build().eval()
    plain = laws_of(model, TEXT, 22).logits(0, 5)
    model.resize_token_embeddings(64, mean_resizing=False)
    torch.testing.assert_close(laws_of(model, TEXT, 22).logits(0, 5), plain)


def test_paths_that_do_not_exist_say_what_does() -> None:
    with pytest.raises(FileNotFoundError, match="not in the zoo"):
        resolve("zoo/chess/teacher")
    with pytest.raises(FileNotFoundError, match="not installed"):
        resolve("package:no_such_package/x.gguf")
    with pytest.raises(FileNotFoundError, match="has no file"):
        resolve("package:opd_lightning/x.gguf")
    with pytest.raises(FileNotFoundError, match="no such model"):
        resolve("./nowhere")
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_a_checkpoints_sampling_settings_are_dropped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(str(pair[0]))
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 7
    assert load_model(str(tmp_path)).generation_config.top_k != 7


def test_an_end_that_is_no_token_is_told_apart_in_words() -> None:
    """-1 in a model's configuration: a text that never ends by itself."""
    theirs = Student("zoo/addition/teacher").tokenizer()
    ours, never = Vocabulary.of(theirs), Vocabulary.of(theirs, (-1,))
    assert special_differences(ours, never, "the teacher") == ["EOS: id -1 ends a text for the teacher alone"]
    assert special_differences(never, ours, "the teacher") == ["EOS: id -1 ends a text for the student alone"]
