"""Every notebook runs from top to bottom in a kernel of its own, with its assertions."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of this interpreter, whatever is installed for the user."""
    from ipykernel.kernelspec import install

    install(prefix=str(tmp_path), kernel_name="here")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share/jupyter"))
    monkeypatch.setenv("OPD_FAST", "1")
    assert sys.executable in (tmp_path / "share/jupyter/kernels/here/kernel.json").read_text()
    return "here"


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in sorted(FOLDER.glob("*.ipynb"))])
def test_runs(name: str, kernel: str, tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "strip the outputs before committing"
    NotebookClient(notebook, kernel_name=kernel, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert "the same gradient in every weight" in shown
    assert pictures
