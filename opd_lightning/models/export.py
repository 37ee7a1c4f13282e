"""The student as files that other programs load, and the proof that they hold the same model."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.models.distributions import evaluating
from opd_lightning.models.lora import base_of
from opd_lightning.models.translation import BYTE_LEVEL
from opd_lightning.models.vocabulary import Vocabulary

__all__ = ["GGUF_FILE", "export_student", "prove_export"]

GGUF_FILE = "model.gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Whose GGUF names and layouts are the same in llama.cpp and in transformers' reader, which the round trip goes through."""
QWEN3_HEAD = 128
"""What transformers 5 takes for the width of a head when it reads a qwen3 file, whatever the file says."""
PROBED = 256
"""Random tokens on which an exported model must give the student's log-probabilities."""


def export_student(student: nn.Module, vocabulary: Vocabulary, folder: Path, merge: bool = False, gguf: bool = False) -> Path:
    """Write a student as a Hugging Face folder with its tokenizer, or as one GGUF file.

    Args:
        student: with whole weights.
        vocabulary: its tokenizer.
        folder: target; made if needed.
        merge: for a LoRA student, fold the adapter into the weights and write a plain model; else the adapter alone.
        gguf: write ``model.gguf`` with weights and tokenizer instead, the adapter folded in.

    Raises:
        ModuleNotFoundError: for GGUF without the ``gguf`` package.
        ValueError: for an architecture or a tokenizer that has no GGUF form here.
    """
    if gguf:
        if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
            raise ModuleNotFoundError("--gguf true writes a GGUF file: pip install 'opd_lightning[gguf]'")
        _refuse_gguf(base_of(student))
    model: Any = student
    if (merge or gguf) and isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    folder.mkdir(parents=True, exist_ok=True)
    if gguf:
        _write_gguf(model, vocabulary, folder / GGUF_FILE)
        return folder
    model.save_pretrained(folder)
    vocabulary.tokenizer.save_pretrained(folder)
    return folder


# ---- the proof ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prove_export(student: nn.Module, vocabulary: Vocabulary, folder: Path) -> str:
    """Load what was exported with transformers (and peft) alone and compare.

    Returns:
        One line that says what was compared.

    Raises:
        ValueError: if the loaded model gives other log-probabilities, or its tokenizer other tokens.
    """
    base: Any = base_of(student)
    if gguf := (folder / GGUF_FILE).is_file():  # whose readers compute in float32 whatever the weights are
        student = copy.deepcopy(student).float()
    dtype = next(student.parameters()).dtype
    loaded, tokenizer = _load_gguf(folder) if gguf else _load(folder, dtype)
    ids = torch.randint(vocabulary.size, (PROBED // 32, 32), generator=torch.Generator().manual_seed(0))
    device = next(student.parameters()).device
    with evaluating(student):
        ours = _logprobs(student, ids.to(device), vocabulary.size).cpu()
    theirs = _logprobs(loaded, ids, vocabulary.size)
    difference = float((ours - theirs).abs().max())
    allowed = 3.0 * torch.finfo(dtype).eps ** 0.5
    if not difference <= allowed:
        adapter = (
            "an adapter's base that was made in the run (model.student.keep_layers, NewStudent) is in no file: export with "
        )
        raise ValueError(
            f"what was exported to {folder} is another model: its log-probabilities differ by up to {difference:.3g} nat "
            f"({allowed:.2g} is allowed for {dtype}); "
            + (
                f"{adapter}--merge true"
                if isinstance(loaded, PeftModel)
                else f"please report the architecture ({type(base).__name__})"
            )
        )
    for row in ids.tolist():
        text = vocabulary.decode(row)
        expected, found = (t(text, add_special_tokens=False).input_ids for t in (vocabulary.tokenizer, tokenizer))
        if expected != found:
            raise ValueError(
                f"the exported tokenizer cuts a text differently: {text[:30]!r} is {expected[:6]}..., there {found[:6]}...; "
                "export a folder instead (without --gguf), whose tokenizer is kept as it is"
            )
    return (
        f"round trip: loaded from {folder} by transformers alone, log-probs of {ids.numel()} random tokens equal the student's "
        f"(largest difference {difference:.2g} nat), {len(ids)} texts give the same tokens"
    )


def _load_gguf(folder: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32).eval(), tokenizer


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tokenizer
    path = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return PeftModel.from_pretrained(base, str(folder)).eval(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the adapter in {folder} does not load on its base {path!r}: a base that was made in the run (model.student."
            f"keep_layers, NewStudent) is in no file. Export with --merge true ({type(error).__name__}: {error})"
        ) from error


def _logprobs(model: nn.Module, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    out: torch.Tensor = logits[..., :vocab].double().log_softmax(-1)
    return out


# ---- GGUF --------------------------------------------------------------------------------------------------------------------


def _refuse_gguf(base: Any) -> None:
    """Raises:
    ValueError: for what a GGUF file of these architectures cannot say.
    """
    config = base.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"no GGUF export for {config.model_type}: {', '.join(ARCHITECTURES)} are written here. Export a folder "
            "(--merge true) and run llama.cpp's own converter on it"
        )
    if config.model_type == "qwen3" and config.head_dim != QWEN3_HEAD:
        raise ValueError(
            f"no GGUF export for qwen3 with heads of {config.head_dim}: transformers reads them as {QWEN3_HEAD}, so nothing "
            "could be proven. Export a folder (--merge true)"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"no GGUF export for rotary positions of type {rope['rope_type']!r}: export a folder (--merge true)")


def _write_gguf(model: Any, vocabulary: Vocabulary, file: Path) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(file.resolve().parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, vocabulary, config.vocab_size)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == config.model_type), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"no GGUF name for the tensor {name}: export a folder (--merge true)")
        _add_tensor(gguf, writer, found, _in_order(tensor.detach().cpu(), name, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_order(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Llama's queries and keys keep the two halves of a rotary pair beside each other in GGUF, apart in transformers."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if config.model_type != "llama" or part not in heads:
        return tensor
    return tensor.reshape(heads[part], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: torch.Tensor) -> None:
    """Matrices in the student's own precision, vectors in float32, as llama.cpp wants them."""
    data: np.ndarray = tensor.float().numpy()
    kinds = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}
    if tensor.dim() < 2 or tensor.dtype not in kinds:
        writer.add_tensor(name, np.ascontiguousarray(data))
        return
    kind = kinds[tensor.dtype]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)


def _add_tokenizer(writer: Any, vocabulary: Vocabulary, rows: int) -> None:
    """Byte-level BPE, as GGUF calls ``gpt2``; character tokenizers are one without merges.

    Raises:
        ValueError: for any other kind.
    """
    import gguf

    tokenizer: Any = vocabulary.tokenizer
    kind = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps(kind.get("decoder"))
    plain = kind["model"]["type"] in ("WordLevel", "BPE") and (kind.get("decoder") or {}).get("type") == "Fuse"
    if not (byte_level or plain):
        raise ValueError(
            "no GGUF export for this tokenizer: byte-level BPE and character tokenizers are written here. Export a folder "
            "(--merge true) and run llama.cpp's own converter on it"
        )
    letters = {b: c for c, b in BYTE_LEVEL.items()}

    def spelled(token: str) -> str:
        return token if byte_level else "".join(letters[b] for b in token.encode())

    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, i in tokenizer.get_vocab().items():
        control = i in special or (i in added and added[i].special)
        tokens[i] = token if control or i in added else spelled(token)
        types[i] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED if i in added else gguf.TokenType.NORMAL
    merges = [m.split(" ") if isinstance(m, str) else m for m in kind["model"].get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(json.dumps(kind.get("pre_tokenizer"))))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([f"{spelled(a)} {spelled(b)}" for a, b in merges])
    else:  # the format has no empty list; from equal scores, transformers makes no merges either
        writer.add_token_scores([0.0] * rows)
    for name, i in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("pad", tokenizer.pad_token_id)):
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    if vocabulary.unk_id is not None:
        writer.add_unk_token_id(vocabulary.unk_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split_of(pre_tokenizer: str) -> str:
    """llama.cpp's name for how a text is cut before it is merged."""
    if '"individual_digits": true' in pre_tokenizer:
        return "smollm"
    if "{1,3}" in pre_tokenizer:
        return "llama-bpe"
    return "qwen2" if "p{L}+|" in pre_tokenizer else "gpt-2"
