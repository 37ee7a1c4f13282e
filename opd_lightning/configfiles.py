"""Configuration files: where they are, what they extend, and what a checkpoint carries."""

from __future__ import annotations

import difflib
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

EXTENDS = re.compile(r"^#\s*extends:\s*(.+?)\s*$", re.MULTILINE)
CONTENT = re.compile(r"^[^#\s]", re.MULTILINE)
CONFIG_FLAGS = ("-c", "--config")


def shipped_folder() -> Path:
    """The folder of the shipped configurations: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def recipes_folder() -> Path:
    """The folder of the recipes of ``opd reproduce``, which are not configurations of a run."""
    return shipped_folder() / "reproduce"


def shipped() -> dict[str, Path]:
    """Short name -> file of every shipped configuration."""
    folder = shipped_folder()
    return {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*.yaml")) if f.parent != recipes_folder()}


def find(name: str, beside: Path | None = None) -> Path:
    """The file that a configuration name stands for: a path, a neighbour of ``beside``, or a shipped short name.

    Raises:
        FileNotFoundError: naming the nearest shipped files.
    """
    places = [Path(name), *([beside.parent / name] if beside else []), shipped_folder() / name]
    for place in places:
        if place.is_file():
            return place.resolve()
    near = difflib.get_close_matches(name, shipped(), 3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise FileNotFoundError(
        f"no configuration {name!r}, neither as a file nor among the shipped ones.{hint} See `opd configs`."
    )


def with_parents(file: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """A file behind everything that its ``# extends: a.yaml, b.yaml`` line names, in the order in which they are applied.

    Raises:
        ValueError: for files that extend each other in a circle.
    """
    if file in seen:
        raise ValueError(f"configurations extend each other in a circle: {' -> '.join(f.name for f in (*seen, file))}")
    text = file.read_text(encoding="utf-8")
    header = text[: m.start()] if (m := CONTENT.search(text)) else text
    out: list[Path] = []
    for match in EXTENDS.finditer(header):
        for name in match.group(1).split(","):
            out += with_parents(find(name.strip(), beside=file), (*seen, file))
    return [*out, file]


def summary(file: Path) -> str:
    """The first line of a file's comment that says what it is."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not EXTENDS.match(line):
            return text
    return ""


def expand(argv: list[str]) -> list[str]:
    """Replace every ``-c name`` by the files that it stands for, in place, so that later ones still win."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in CONFIG_FLAGS:
            out.append(word)
            continue
        name = value if equals else next(words, "")
        if not name:
            raise ValueError(f"{flag} needs the name of a configuration (see `opd configs`)")
        for file in with_parents(find(name)):
            if CONTENT.search(file.read_text(encoding="utf-8")):  # a file of comments only extends others
                out += ["--config", str(file)]
    return out


def flag_value(argv: list[str], flag: str) -> str | None:
    """The value of ``--flag value`` or ``--flag=value``."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1]
    return None


def carried(checkpoint: Path) -> dict[str, Any]:
    """The configuration inside a checkpoint; empty if it carries none."""
    import torch

    meta = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    state = torch.load(meta, map_location="cpu", weights_only=True, mmap=True)
    for key, value in state.get("callbacks", {}).items():
        if key.startswith("CarriedConfig"):
            found: dict[str, Any] = yaml.safe_load(value["config"])
            return found
    return {}


def with_carried(argv: list[str]) -> list[str]:
    """Put the configuration of ``--ckpt_path file`` in front: defaults < checkpoint < files < flags.

    So ``opd validate --ckpt_path X`` and ``opd fit --ckpt_path X --model.optimizer.init_args.lr 1e-5`` need no YAML.
    """
    path = flag_value(argv, "--ckpt_path")
    if path is None or path in ("last", "best", "null") or not Path(path).exists():
        return argv
    config = carried(Path(path))
    config.pop("ckpt_path", None)
    if not config:
        return argv
    if argv[0] != "fit":
        config = {k: v for k, v in config.items() if k not in ("weights_only",)}
    file = Path(tempfile.mkdtemp(prefix="opd-")) / "from_checkpoint.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [argv[0], "--config", str(file), *argv[1:]]
