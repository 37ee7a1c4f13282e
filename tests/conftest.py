"""Shared fixtures: tiny real models, no network, shapes checked."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # processes that tests start say where they crash

from jaxtyping import install_import_hook

# The shapes in the signatures of the maths are checked while the tests run, and only then.
install_import_hook(["opd_lightning.ops", "opd_lightning.objectives"], "beartype.beartype")

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", module="transformers")
for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A group of this process would keep a port, and name it to the processes that later tests start."""
    yield
    assert not torch.distributed.is_initialized(), "a test that trains on ranks belongs in a process of its own"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny random student and a tiny random, larger teacher with one tokenizer."""
    from opd_lightning.models.tiny import save_tiny

    root = tmp_path_factory.mktemp("pair")
    student = save_tiny(root / "student", hidden=16, layers=2, heads=2, seed=1)
    return student, save_tiny(root / "teacher", hidden=32, layers=2, heads=4, seed=2)


@pytest.fixture(params=["AVX512", "AVX2"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Functions in C as they are built for processors with these vectors; wider ones run what is for narrower ones."""
    from opd_lightning.compiling import VECTORS
    from opd_lightning.ops import packed, pointwise, reverse_kl
    from opd_lightning.samplers import drawing, stepped

    names = list(VECTORS)
    if names.index(request.param) < names.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    for module in (packed, pointwise, reverse_kl, drawing, stepped):
        module.library.cache_clear()
    yield
    for module in (packed, pointwise, reverse_kl, drawing, stepped):
        module.library.cache_clear()
