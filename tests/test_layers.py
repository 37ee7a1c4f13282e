"""Imports point down, files and functions keep their caps."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "opd_lightning"
LAYERS = [
    {"ops", "types", "media", "bars", "clock", "configurable", "memory", "seeds", "paths", "compiling", "endpoint"},
    {"objectives", "models", "data", "metrics", "parallel", "schedulers"},
    {"samplers", "sources", "strategies"},
    {"module"},
    {"callbacks"},
    {"trainer"},
    {"inspect", "configfiles"},
    {"preflight", "zoo"},
    {"commands"},
    {"cli"},
    {"notebook"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {"transformers": {"models", "samplers", "data"}, "peft": {"models", "module"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[int, str]]:
    out = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "opd_lightning" else [str(node.module)]
            out += [(node.lineno, name) for name in names]
    return out


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    here = part(file)
    for line, name in imports(file):
        if name.startswith("opd_lightning."):
            there = name.split(".")[1]
            assert LEVEL[there] <= LEVEL[here], f"{file}:{line} imports {name} from a higher layer"
            assert {here, there} != {"objectives", "models"}, f"{file}:{line}: objectives and models do not know each other"
        top = name.split(".")[0]
        assert here in ONLY_IN.get(top, {here}), f"{file}:{line}: {top} belongs into {', '.join(ONLY_IN[top])}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_caps(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert length <= 60, f"{file}:{node.lineno} {node.name} has {length} lines"
            why = text.splitlines()[node.lineno - 2].strip().startswith("#")  # a cap is broken by a comment that says why
            if node.name == "__init__" and not why:
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                assert count <= 10, f"{file}:{node.lineno} has {count} constructor arguments"
