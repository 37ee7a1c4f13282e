"""Students and teachers that do not match: accepted with a named adaptation, warned about, or refused with the key."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3Config,
    T5Config,
)

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.data import ChatTemplate, JsonlPrompts
from opd_lightning.models import (
    AdapterOffTeacher,
    CrossTokenizerTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    StartTeacher,
    Student,
)
from opd_lightning.models.tiny import SPECIAL, character_tokenizer
from opd_lightning.module import OPDModule
from opd_lightning.objectives import MatchedVocab, Objective, ReverseKL, SampledToken
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import MixtureSource, StudentSource, TeacherSource
from tests.helpers import tiny_data, tiny_trainer

ALPHABET = "0123456789+=,;&c# "
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinking %}&{% endif %}="
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
REVERSE, MATCHED = Objective(ReverseKL()), Objective(ReverseKL(), MatchedVocab())
Verdict = Literal["accepts", "warns", "refuses"]


class Case(NamedTuple):
    """What stands in the place of the ordinary pair, and what must be said about it."""

    name: str
    verdict: Verdict
    words: str
    make: Callable[[Path], dict[str, Any]]


def tokens(change: Callable[[Any], None] | None = None, alphabet: str = ALPHABET) -> Any:
    tokenizer = character_tokenizer(alphabet)
    if change is not None:
        change(tokenizer)
    return tokenizer


def saved(folder: Path, tokenizer: Any = None, kind: Any = LlamaConfig, rows: int = 0, dtype: Any = None, **extra: Any) -> str:
    """A random model of any architecture with a tokenizer, as a folder."""
    tokenizer = tokenizer or tokens()
    vocab = rows or max(tokenizer.get_vocab().values()) + 1
    ends = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(vocab_size=vocab, **{**SIZES, **ends, **extra}))
    model.to(dtype or torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teacher(**choices: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"teacher": FrozenTeacher(saved(folder / "teacher", **choices))}


def student(**choices: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"student": Student(saved(folder / "student", **choices))}


def foreign(tokenizer: Any, objective: Any = MATCHED) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {
        "teacher": CrossTokenizerTeacher(saved(folder / "teacher", tokenizer)),
        "objective": objective,
    }


def permuted(tokenizer: Any) -> None:
    vocab = {t: i for i, t in enumerate([*SPECIAL, *reversed(ALPHABET)])}
    tokenizer.backend_tokenizer.model = token_models.WordLevel(vocab, unk_token="<unk>")


def further(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<think>", "</think>"])


def ends_elsewhere(tokenizer: Any) -> None:
    tokenizer.eos_token = "#"


def begins_nowhere(tokenizer: Any) -> None:
    tokenizer.bos_token = None


def no_padding(tokenizer: Any) -> None:
    tokenizer.pad_token = None


def chatty(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT


def other_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT.replace("&", "#")


def prepends(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("0")


def endless(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def word_pieces() -> Any:
    inner = Tokenizer(token_models.WordPiece({"[UNK]": 0, "1": 1, "<eos>": 2, "##2": 3}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="[UNK]")


def both_chat(ours: Any = None, theirs: Any = None) -> Callable[[Path], dict[str, Any]]:
    """A pair of chat models with templates for each."""

    def make(folder: Path) -> dict[str, Any]:
        return {
            "student": Student(saved(folder / "student", tokens(chatty))),
            "teacher": FrozenTeacher(saved(folder / "teacher", tokens(chatty))),
            "template": ours or ChatTemplate(),
            **({"teacher_template": theirs} if theirs else {}),
        }

    return make


def media(folder: Path) -> dict[str, Any]:
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(text_config={**SIZES, "vocab_size": 30, "rope_parameters": axes}, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "vl")
    tokens().save_pretrained(folder / "vl")
    return {"teacher": FrozenTeacher(str(folder / "vl"))}


def encoder(folder: Path) -> dict[str, Any]:
    T5Config(vocab_size=30, d_model=16).save_pretrained(folder / "t5")
    tokens().save_pretrained(folder / "t5")
    return {"teacher": FrozenTeacher(str(folder / "t5"))}


def image(folder: Path) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "1+1="}]
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": content}]}) + "\n")
    return {**both_chat()(folder), "prompts": JsonlPrompts(str(rows)), "held_out": 0}


GEMMA = {"kind": Gemma2Config, "head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": None}
CASES = [
    # vocabulary
    Case("equal", "accepts", "vocabulary: 22 tokens", teacher()),
    Case("the teacher's rows are padded", "accepts", "padding rows cut off before the soft-max: 10 of the teacher",
         teacher(rows=32)),
    Case("the student's rows are padded", "accepts", "padding rows cut off before the soft-max: 10 of the student",
         student(rows=32)),
    Case("other order of ids", "refuses", "id 4: student '0', teacher ' '", teacher(tokenizer=tokens(permuted))),
    Case("other alphabet", "refuses", "CrossTokenizerTeacher", teacher(tokenizer=tokens(alphabet="abc0123"))),
    Case("the teacher has further tokens", "warns", "2 tokens that the teacher alone has are cut off: <think>",
         teacher(tokenizer=tokens(further))),
    Case("the student has further tokens", "refuses", "id 22: student '<think>', teacher '(none)'",
         student(tokenizer=tokens(further))),
    Case("fewer rows than tokens", "refuses", "model.teacher.path", teacher(rows=20)),
    # tokenizers
    Case("another tokenizer, translated", "accepts", "two tokenizers: 16 tokens are in both vocabularies",
         foreign(tokens(alphabet="0123456789+=xy"))),
    Case("another tokenizer, sampled token", "refuses", "support: MatchedVocab",
         foreign(tokens(alphabet="0123456789+=xy"), Objective(ReverseKL(), SampledToken()))),
    Case("another tokenizer, whole vocabulary", "refuses", "support: MatchedVocab",
         foreign(tokens(alphabet="0123456789+=xy"), REVERSE)),
    Case("a tokenizer that changes the text", "refuses", "model.teacher.path", foreign(tokens(prepends))),
    Case("word pieces", "refuses", "does not keep the bytes of a text", foreign(word_pieces())),
    Case("nothing shared", "refuses", "share no token", foreign(tokens(alphabet="xyz"))),
    # special tokens and templates
    Case("other EOS", "warns", "EOS: # ends a text for teacher alone", teacher(tokenizer=tokens(ends_elsewhere))),
    Case("a second EOS", "warns", "EOS: # ends a text for teacher alone", teacher(eos_token_id=[2, 20])),
    Case("no BOS", "warns", "BOS: a text begins with <bos> for the student and with None for teacher",
         teacher(tokenizer=tokens(begins_nowhere))),
    Case("no PAD", "accepts", "vocabulary: 22 tokens", student(tokenizer=tokens(no_padding))),
    Case("no EOS", "refuses", "no end-of-sequence token", student(tokenizer=tokens(endless))),
    Case("other chat template", "warns", "template: teacher was trained with another chat template",
         lambda f: {**both_chat()(f), "teacher": FrozenTeacher(saved(f / "other", tokens(other_chat)))}),
    Case("no chat template", "refuses", "data.template", lambda f: {"template": ChatTemplate()}),
    Case("thinking flag", "warns", "options {} against {'thinking': True}",
         both_chat(theirs=ChatTemplate(options={"thinking": True}))),
    # precision
    Case("a teacher in bfloat16", "accepts", "dtype='bfloat16'",
         lambda f: {"teacher": FrozenTeacher(saved(f / "t", dtype=torch.bfloat16), "bfloat16")}),
    Case("a student in float16", "refuses", "student.dtype=float16",
         lambda f: {"student": Student(saved(f / "s"), dtype="float16")}),
    Case("an unknown dtype", "refuses", "teacher.dtype='fp8'", lambda f: {"teacher": FrozenTeacher("x", "fp8")}),
    # architectures
    Case("soft-capped logits", "accepts", "vocabulary: 22 tokens", teacher(**GEMMA)),
    Case("scaled logits and tied heads", "accepts", "vocabulary: 22 tokens", teacher(kind=CohereConfig, logit_scale=0.25)),
    Case("another architecture, heads apart", "accepts", "vocabulary: 22 tokens",
         teacher(kind=Qwen3Config, head_dim=8, tie_word_embeddings=False)),
    Case("absolute positions", "accepts", "vocabulary: 22 tokens", teacher(kind=GPT2Config, n_embd=16, n_layer=1, n_head=2)),
    Case("a teacher that could look, and text", "accepts", "padding rows cut off before the soft-max: 8 of the teacher", media),
    Case("an image, and models that read text only", "refuses", "reads text only: give a model with a processor", image),
    Case("an encoder", "refuses", "model.teacher.path", encoder),
    # who teaches whom
    Case("adapter-off without an adapter", "refuses", "model.student.lora", lambda f: {"teacher": AdapterOffTeacher()}),
    Case("itself, told nothing", "refuses", "data.teacher_template", lambda f: {"teacher": StartTeacher()}),
    Case("a teacher that cannot write", "refuses", "rollout.source", lambda f: {
        "teacher": EnsembleTeacher([FrozenTeacher(saved(f / str(i))) for i in range(2)]),
        "source": MixtureSource(StudentSource(), TeacherSource()),
    }),
    Case("a folder that is not there", "refuses", "no such model file or folder", lambda f: {"teacher": FrozenTeacher("./no")}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_each_pair_gets_its_verdict(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One optimizer step of each, as a user would start it."""
    said: list[str] = []
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    refused = ""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            parts = case.make(tmp_path)
            module = OPDModule(
                parts.get("student") or Student(saved(tmp_path / "plain-student")),
                parts.get("teacher") or FrozenTeacher(saved(tmp_path / "plain-teacher")),
                parts.get("objective", REVERSE),
            )
            data = {k: parts[k] for k in ("template", "teacher_template", "prompts", "held_out") if k in parts}
            refresh = RolloutRefresh(parts.get("source", StudentSource()), NativeSampler(max_new_tokens=4), seed=1)
            tiny_trainer(tmp_path, [refresh], max_steps=1).fit(module, tiny_data(batch_size=4, **data))
        except (ValueError, OSError, TypeError) as error:
            refused = str(error)
        said = [str(w.message) for w in found if w.category is UserWarning or "rank_zero" in str(w.filename)]
    told = [record.getMessage() for record in caplog.records]
    if case.verdict == "refuses":
        assert case.words in refused, refused or "it was accepted"
        return
    assert not refused
    ours = [w for w in said if "model." in w or "data." in w]
    assert any(case.words in line for line in (ours if case.verdict == "warns" else told)), (ours, told)
    if case.verdict == "accepts":
        assert not ours
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 30 and len({c.name for c in CASES}) == len(CASES)
    assert {c.verdict for c in CASES} == {"accepts", "warns", "refuses"}
