"""Functions in C, built by the machine's own compiler when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from opd_lightning.paths import cache_dir

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

SHARED = Path(__file__).with_suffix(".h")
"""What several sources include. Beside a source may lie headers of its own."""

POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


def built(source: Path, features: Sequence[str]) -> ctypes.CDLL | None:
    """Functions in C, compiled once and kept in the cache folder; None where there is no compiler, or, with a line that says
    so, where it fails. PyTorch does the same work then.

    Args:
        source: of the functions.
        features: of the processor, which they may use.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    return _built(source, compiler, (*FLAGS, *(f"-m{feature}" for feature in features))) if compiler else None


@functools.cache
def _built(source: Path, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    read = (source, SHARED, *sorted(source.parent.glob("*.h")))
    text = b"".join(file.read_bytes() for file in read) + " ".join([compiler, *flags]).encode()
    stamp = hashlib.sha256(text).hexdigest()[:16]
    target = cache_dir() / "compiled" / f"{source.stem}-{stamp}.so"
    try:
        if not target.is_file():
            _build([compiler, *flags, f"-I{SHARED.parent}", str(source)], target)
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
