"""What the README says is run: its commands (made small), its Python, and the names in its tables."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from opd_lightning.cli import _class_names, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("opd ")
]
SMALL = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
SMALL += ["--data.batch_size", "4", "--report.controls", "{}", "--rollout.sampler.max_new_tokens", "6"]
SMALL += ["--eval.sampler.max_new_tokens", "6", "--data.held_out_prompts.size", "8", "--trainer.enable_progress_bar", "false"]


def code(kind: str) -> list[str]:
    return [text for k, text in BLOCKS if k == kind]


def mine() -> list[str]:
    """A divergence of one's own, and its proof."""
    return [text for text in code("python") if "LeCam" in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a finished (small) quickstart and the README's own module."""
    root = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "mine.py").write_text(mine()[0])
        assert main(["fit", "-c", "quickstart.yaml", *SMALL, "--trainer.default_root_dir", str(root / "small")]) == 0
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    run = folder / "runs/quickstart"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "small", run)
    shutil.copy(run / "checkpoints/step-000002.ckpt", run / "checkpoints/step-000150.ckpt")
    real = folder / "runs/smollm2_system_prompt/checkpoints"
    real.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "checkpoints/step-000002.ckpt", real / "step-000060.ckpt")
    words = shlex.split(command)[1:]
    if words[0] == "fit":
        words = [*words, *SMALL]
    try:
        assert main(words) == 0
    except SystemExit as done:
        assert "--print_config" in words
        assert done.code == 0


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    define, prove = mine()
    scope: dict = {}
    exec(define, scope)  # the README's own text
    exec(prove, scope)
    world, objective = scope["world"], scope["objective"]
    assert (world.moments_of(objective).mean - world.declared_gradient(objective)).abs().max() < 1e-10


def test_a_run_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = (text for text in code("python") if "import steps" in text)
    exec(text, {})
    assert "step 1: 8 rollouts" in (shown := capsys.readouterr().out) and "step 2: 8 rollouts" in shown


def test_every_class_of_the_axes_table_exists() -> None:
    table = README[README.index("| axis | key | choices |") : README.index("`TopK` is chosen by")]
    names = set(re.findall(r"`([A-Z]\w+)", table))
    assert len(names) > 25
    assert names <= _class_names()


def test_every_path_of_the_map_exists() -> None:
    table = README[README.index("## Where things are") : README.index("Strategies (")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    for path in re.findall(r"`([\w./]+)`", " ".join(cells)):
        assert any((base / path).exists() for base in (ROOT, ROOT / "opd_lightning")), path
