"""From a name in a configuration to weights and a tokenizer, without a network unless the name is a hub model."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from opd_lightning.memory import is_kept
from opd_lightning.models.processors import auto_class, looks
from opd_lightning.paths import cache_dir, packaged_file

ZOO = Path(__file__).resolve().parent.parent / "zoo"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def zoo_models() -> list[str]:
    """Names of the bundled models, as ``path`` takes them."""
    return sorted(f"zoo/{f.parent.parent.name}/{f.parent.name}" for f in ZOO.glob("*/*/config.json"))


def resolve(path: str) -> str:
    """The folder, GGUF file or hub name that ``path`` stands for.

    Args:
        path: a folder, a ``.gguf`` file, ``zoo/<task>/<model>``, ``package:<module>/<file>`` (a file that an installed
            package carries), or a hub name.

    Raises:
        FileNotFoundError: for a zoo model, package or file that does not exist, naming what does.
    """
    local = Path(path).expanduser()
    if local.exists():
        return str(local)
    if path.startswith("zoo/"):
        if (ZOO / path[4:] / "config.json").is_file():
            return str(ZOO / path[4:])
        raise FileNotFoundError(f"{path!r} is not in the zoo. Bundled models: {', '.join(zoo_models()) or 'none'}")
    if path.startswith("package:"):
        return str(packaged_file(path))
    if local.suffix == ".gguf" or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such model file or folder: {path!r}")
    return path


def local_folder(path: str) -> str:
    """Like `resolve`, with a GGUF file converted once to a folder of safetensors in `cache_dir`."""
    found = resolve(path)
    if not found.endswith(".gguf"):
        return found
    file = Path(found)
    stat = file.stat()
    stamp = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / "gguf" / f"{file.stem}-{stamp}"
    if not (target / "config.json").is_file():
        _convert_gguf(file, target)
    return str(target)


def _convert_gguf(file: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError(f"{file.name} is a GGUF file: pip install 'opd_lightning[gguf]'")
    print(f"Converting {file.name} to safetensors once, into {target} ...", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are whole again; transformers would refuse to save them
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():  # another process was faster
        shutil.rmtree(partial)
        return
    partial.rename(target)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        OSError: if there is none, saying where it was looked for.
    """
    folder = local_folder(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OSError(f"no tokenizer for {path!r} (looked in {folder!r}): {error}") from error
    if tokenizer.eos_token_id is None:
        raise OSError(f"the tokenizer of {path!r} has no end-of-sequence token: completions could never end")
    return tokenizer


def load_config(path: str) -> Any:
    """The architecture of a model, without its weights.

    Raises:
        ValueError: for one that is not a causal language model, over text or over text and images.
    """
    config = AutoConfig.from_pretrained(local_folder(path))
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or looks(config)
    if getattr(config, "is_encoder_decoder", False) or not known:
        raise ValueError(
            f"{path!r} ({config.model_type}) is not a causal language model: models with an encoder, and those that only "
            "listen or draw, do not pass here. Give a text model, or one that takes images beside text (model.student.path, "
            "model.teacher.path)"
        )
    return config


_HOLLOW = ContextVar("opd_hollow", default=False)


@contextmanager
def hollow() -> Iterator[None]:
    """Inside, models are made without memory for their weights (on the meta device), and `load_model` reads none."""
    token = _HOLLOW.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _HOLLOW.reset(token)


def hollow_model(config: Any, **settings: Any) -> nn.Module:
    """A model without the memory for its weights: for counting, or to be filled."""
    with hollow():
        model: nn.Module = auto_class(config).from_config(config, **settings)
    return model


def load_model(path: str, dtype: str = "float32") -> nn.Module:
    """A causal language model in eval mode; inside `hollow`, without its weights.

    Its generation settings are reduced to the special tokens: a checkpoint's own ``top_k`` or ``repetition_penalty`` would
    otherwise fill every sampling field that a caller leaves open.

    Args:
        path: see `resolve`.
        dtype: of the weights, one of `DTYPES`.

    Raises:
        ValueError: for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    hf_logging.disable_progress_bar()
    folder, kind = local_folder(path), getattr(torch, dtype)
    config = AutoConfig.from_pretrained(folder)
    if not _HOLLOW.get():
        loaded = blank_generation(auto_class(config).from_pretrained(folder, dtype=kind))
        for parameter in loaded.parameters():  # in its file's mapping, whose pages are small, it is read a tenth slower
            if not is_kept(parameter.data_ptr()):
                parameter.data = parameter.data.clone()
        return loaded
    model: Any = hollow_model(config, dtype=kind).eval()
    with suppress(OSError):  # as in `from_pretrained`, the file is not required
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return blank_generation(model)


def blank_generation(model: Any) -> nn.Module:
    """Keep only the special tokens of the generation settings."""
    hf_logging.disable_progress_bar()  # also of saving: runs show their own
    old = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id, bos_token_id=old.bos_token_id
    )
    fixed: nn.Module = model
    return fixed
