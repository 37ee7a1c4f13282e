"""The benchmarks' own arithmetic, and that their loss is the naive one. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script as `python benchmarks/<name>.py` would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    own = {f.stem for f in FOLDER.glob("*.py")}
    for name in (set(sys.modules) - before) & own:
        del sys.modules[name]


@pytest.mark.parametrize("frozen", [False, True])
def test_our_side_of_the_loss_is_the_naive_one(script, frozen: bool) -> None:
    worker = script("worker_loss")
    found = worker.errors(worker.ours(), tokens=24, vocab=300, width=16, dtype="bfloat16", frozen=frozen)
    assert found["loss_error"] < 1e-5
    assert found["gradient_error"] < 1e-5


def test_a_wrong_loss_is_noticed(script) -> None:
    worker = script("worker_loss")
    found = worker.errors(lambda given: 1.001 * worker.naive(given), tokens=8, vocab=50, width=4, dtype="float32", frozen=False)
    assert found["loss_error"] == pytest.approx(1e-3, rel=1e-2)
    assert found["gradient_error"] == pytest.approx(1e-3, rel=1e-2)


def test_phases_are_exclusive_and_add_up(script) -> None:
    clock = script("protocol").Clock()
    clock.start()
    with clock.phase("outer"):
        time.sleep(0.01)
        with clock.phase("inner"):
            time.sleep(0.02)
    found = clock.stop()
    assert found["phases"]["inner"] >= 0.02
    assert found["phases"]["outer"] >= 0.01
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"])


def test_disturbed_repetitions_are_left_out(script) -> None:
    harness = script("harness")
    quiet = [harness.Sample(1.0, 0.01), harness.Sample(2.0, 0.02), harness.Sample(3.0, 0.05)]
    loud = [harness.Sample(90.0, 0.5), harness.Sample(80.0, 0.4)]
    assert harness.summary([*loud, *quiet])["median"] == 2.0
    few = harness.summary([*loud, quiet[0], harness.Sample(5.0, 0.2)])
    assert few["median"] == 5.0
    assert not few["quiet"]


def test_exponent_and_crossing(script) -> None:
    assert script("harness").exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    curve = [{"step": 0.0, "kl": 1.0}, {"step": 10.0, "kl": 0.01}]
    assert script("to_target").crossing(curve, "step", 0.1) == pytest.approx(5.0)
    assert math.isnan(script("to_target").crossing(curve, "step", 0.001))


def test_table_goes_between_the_markers(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, machine = script("table"), script("harness").machine()
    ratios = {"bf16": {"vs_gkd": 0.4, "vs_distillation": 0.25, "vs_fastest": 0.4, "peak_rss": 0.7}}
    (tmp_path / "vs_trl.json").write_text(json.dumps({"machine": machine, "ratios": ratios}))
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    words = ["table.py", "--results", str(tmp_path), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*words, "--check"])
    with pytest.raises(SystemExit, match="--write"):
        table.main()
    monkeypatch.setattr(sys, "argv", [*words, "--write"])
    table.main()
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| whole optimizer step, SmolLM2 pair, bf16 | TRL GKDTrainer | 2.5 × faster |" in text
    monkeypatch.setattr(sys, "argv", [*words, "--check"])
    table.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_refuses_without_one(script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="NVIDIA GPU"):
        script("gpu").main()


def test_every_script_is_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    parts = {"gate", "harness", "pairs", "protocol"}
    commands = {f.stem for f in FOLDER.glob("*.py") if not f.stem.startswith("worker_")} - parts
    assert not [name for name in sorted(commands) if f"python benchmarks/{name}.py" not in text]
