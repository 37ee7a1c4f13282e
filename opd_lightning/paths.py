"""Where files lie: those that travel inside packages, and what is kept for the next run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted checkpoints and compiled functions are kept: ``$OPD_CACHE``, or ``~/.cache/opd_lightning``."""
    return Path(os.environ.get("OPD_CACHE", "~/.cache/opd_lightning")).expanduser()


def packaged_file(path: str) -> Path:
    """The file that ``package:<module>/<file>`` names. The module is located, not imported.

    Raises:
        FileNotFoundError: if the package is not installed or has no such file.
    """
    module, _, name = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{path!r}: the package {module!r} is not installed (pip install it, then run again)")
    file = Path(next(iter(spec.submodule_search_locations))) / name
    if not file.exists():
        raise FileNotFoundError(f"{path!r}: the package {module!r} has no file {name!r}")
    return file


def data_file(path: str) -> Path:
    """A file named by a configuration: as it stands, or ``package:<module>/<file>``.

    Raises:
        FileNotFoundError: if there is none, with the folder that was looked in.
    """
    if path.startswith("package:"):
        return packaged_file(path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path!r} (working folder {Path.cwd()})")
    return file
