"""`opd resume-drill`: equal where resuming is exact, and it finds a run that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.inspect.drill import Outcome, Schedule, differences, table
from opd_lightning.inspect.moments import MOMENTS, Drilled, digest

CONFIG = """
trainer: {{accelerator: cpu, callbacks: [EntropyMonitor{more}]}}
model:
  student: {{path: {student}, lora: {{r: 4, dropout: 0.1}}}}
  teacher: {{class_path: FrozenTeacher, init_args: {{path: {teacher}}}}}
data:
  prompts: {{class_path: TaskPrompts, init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 60}}}}
  held_out: 8
  batch_size: 8
  micro_batch_size: {micro}
cold_start: {{steps: 20}}
rollout: {{every_n_steps: 2, sampler: {{max_new_tokens: 8}}}}
eval: {{sampler: {{max_new_tokens: 8}}}}
"""
FORGETFUL = """
import lightning.pytorch as pl

class Forgetful(pl.Callback):
    '''A warm-up that counts steps and keeps the count to itself.'''

    count = 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.count += 1
        optimizer.param_groups[0]["lr"] = 1e-3 * self.count
"""


def written(root: Path, pair: tuple[Path, Path], micro: int = 4, more: str = "") -> Path:
    config = root / "drill.yaml"
    config.write_text(CONFIG.format(student=pair[0], teacher=pair[1], micro=micro, more=more))
    return config


def drilled(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> tuple[int, dict, str]:
    code = main(["resume-drill", "-c", str(config), "--json", *words])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "moments"),
    [
        ("SIGKILL", ("rollout", "checkpoint")),
        ("SIGTERM", ("accumulation", "evaluation")),
        ("exception", ("backward", "refresh")),
    ],
)
def test_every_moment_comes_back(
    way: str, moments: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    code, found, said = drilled(capsys, written(tmp_path, pair), "--ways", way, "--moments", *moments, "--folder", str(folder))
    assert code == 0 and found["equal"] and not found["absent"]
    assert [c["moment"] for c in found["cases"]] == [MOMENTS[m] for m in moments]
    # killed runs go back to the middle of a refresh; one that was asked to stop has written its last step
    assert all(c["resumed_from"] > 3 if way == "SIGTERM" else c["resumed_from"] in (3, 6) for c in found["cases"])
    assert said.count("resumed from step") == len(moments)  # a line of progress each
    notes = (folder / "reference.notes.0").read_text()
    assert all(f'["{kind}"' in notes for kind in ("rollouts", "losses", "metrics")) and "train/loss" in notes


@pytest.mark.slow
def test_two_processes_come_back_to_the_bit(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, two = tmp_path / "runs", ("--trainer.strategy", "fsdp2", "--trainer.devices", "2")
    config = written(tmp_path, pair, micro=2)
    code, found, _ = drilled(capsys, config, "--ways", "SIGKILL", "--moments", "backward", "--folder", str(folder), *two)
    assert code == 0 and found["equal"] and [c["resumed_from"] for c in found["cases"]] == [3]  # inside a refresh
    assert all('["losses"' in (folder / f"reference.notes.{rank}").read_text() for rank in (0, 1))


@pytest.mark.slow
def test_a_callback_that_forgets_is_found(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).resolve().parents[2]}:{tmp_path}")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = written(tmp_path, pair, micro=8, more=", forgetful.Forgetful")
    moments = ("accumulation", "refresh")
    code, found, _ = drilled(capsys, config, "--ways", "SIGKILL", "--moments", *moments, "--folder", str(tmp_path / "runs"))
    assert code == 1 and not found["equal"]
    assert found["absent"] == [MOMENTS["accumulation"]]  # one micro-batch makes a step
    (case,) = found["cases"]
    kinds = {line.partition(":")[0] for line in case["differs"]}
    assert {"weights", "metrics"} <= kinds and any("train/learning_rate of step" in line for line in case["differs"])


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7, 50])
def test_moments_lie_behind_a_checkpoint_and_before_the_end(every: int) -> None:
    schedule = Schedule.of(every)
    boundaries = [step for step in range(schedule.checkpoint + 1, schedule.steps - 1) if step % every == 0]
    assert boundaries  # a refresh begins after the first checkpoint, and steps follow it
    assert 2 * schedule.checkpoint < schedule.steps and schedule.checkpoint + 1 < schedule.steps
    assert every == 1 or schedule.checkpoint % every  # the first checkpoint lies inside a refresh


def test_every_bit_counts() -> None:
    one = {"a": torch.ones(3), "b": [1, None]}
    last_bit = {"a": torch.nextafter(torch.ones(3), torch.tensor(2.0)), "b": [1, None]}
    assert digest(one) == digest({"a": torch.ones(3), "b": [1, None]}) != digest(last_bit)
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2)) != digest(torch.zeros(3, 2, dtype=torch.float16))


def test_what_differs_is_counted_and_a_missing_line_too() -> None:
    expected = {("losses", f"micro-batch {i}", ".0"): "a" for i in range(3)} | {("moments", "backward", ".0"): ""}
    assert differences(expected, expected) == []
    found = {key: value for key, value in expected.items() if key[1] == "micro-batch 0"}
    assert differences(expected, found) == ["losses: 2 of 3 (first: micro-batch 1)"]
    wrong = Outcome("refresh", "SIGKILL", 3, ("weights: 1 of 2 (first: a)",))
    page = table([wrong, Outcome("batch", "SIGTERM", 4, ())], ["accumulation"])
    assert "1 of 2 came back" in page and "does not occur" in page and "weights: 1 of 2" in page


def test_refusals(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="allowed are rollout, batch"):
        Drilled("notes", moment="lunch")
    config = written(tmp_path, pair)
    assert main(["resume-drill", "-c", str(config), "--folder", str(tmp_path)]) == 2  # not empty
    assert "begins with nothing" in capsys.readouterr().err
