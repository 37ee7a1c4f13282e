"""Functions in C, built by the machine's own compiler when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning.paths import cache_dir

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

SHARED = Path(__file__).parent
"""Where headers are that several sources include. Beside a source may lie headers of its own."""

VECTORS = {
    "AVX512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "prefer-vector-width=512"),
    "AVX2": ("avx2", "fma"),
}
"""What sources that name ``vectors.h`` may use of a processor, by what PyTorch uses of it."""

HALVES = "avx512bf16"
"""The same of one that multiplies bfloat16."""

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


def vectors() -> tuple[str, ...] | None:
    """What sources that name ``vectors.h`` may use of this processor; None if it has no vectors of eight numbers and more."""
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or platform.machine() != "x86_64" or capability not in VECTORS:
        return None
    half = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return (*VECTORS[capability], *((HALVES,) if half else ()))


def built(source: Path, features: Sequence[str] | None) -> ctypes.CDLL | None:
    """Functions in C, compiled once and kept in the cache folder; None where there is no compiler, or, with a line that says
    so, where it fails. PyTorch does the same work then. The compiler is ``cc``, or what ``CC`` says, be it with flags.

    Args:
        source: of the functions.
        features: of the processor, which they may use; None if it lacks what they need.
    """
    name, *flags = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = shutil.which(name)
    if features is None or compiler is None:
        return None
    return _built(source, compiler, (*flags, *FLAGS, *(f"-m{feature}" for feature in features)))


@functools.cache
def _built(source: Path, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    read = (source, *sorted(SHARED.glob("*.h")), *sorted(source.parent.glob("*.h")))
    text = b"".join(file.read_bytes() for file in read) + " ".join([compiler, *flags]).encode()
    stamp = hashlib.sha256(text).hexdigest()[:16]
    target = cache_dir() / "compiled" / f"{source.stem}-{stamp}.so"
    try:
        if not target.is_file():
            _build([compiler, *flags, f"-I{SHARED}", str(source)], target)
        return ctypes.CDLL(str(target))  # shares the threads of torch, whose libgomp is loaded already
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        rank_zero_info(f"{source.name} could not be built, so PyTorch does its work, which is slower ({told.strip()[-200:]})")
        return None


def _build(command: Sequence[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes may build at once; the last one stays
        made = Path(folder) / target.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(target)
