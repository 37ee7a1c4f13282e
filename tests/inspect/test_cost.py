"""The forecast of a step: it counts what the model really has, and it stands beside three measured steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.inspect.cost import Load, Machine, Shape, forecast, memory
from opd_lightning.models.lora import LoRA
from opd_lightning.models.students import Student

MACHINE = Machine("cpu", {torch.float32: 1e11, torch.bfloat16: 4e11}, 5e10)
LOAD = Load(rollouts=8, prompt=64.0, completion=128, micro_batch=8, decoded_together=8, every_n_steps=1, passes=1)


@pytest.mark.parametrize("recipe", [{}, {"lora": LoRA(r=2)}, {"keep_layers": 1}], ids=["full", "lora", "pruned"])
def test_counts_are_those_of_the_built_model(recipe: dict) -> None:
    student = Student("zoo/addition/student", **recipe)
    built = student.build()
    shape = Shape.of(student.config(), student.dtype, student)
    assert shape.total == sum(p.numel() for p in built.parameters())
    assert shape.trained == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert shape.layers == len([n for n, _ in built.named_modules() if n.endswith("self_attn")])


def test_the_forecast_scales_as_the_work_does() -> None:
    student = Shape.of(Student("zoo/addition/student").config(), "float32", Student("zoo/addition/student"))
    student = replace(student, body=10**8, head=10**7, total=11 * 10**7, trained=11 * 10**7)
    teacher = replace(student, body=3 * 10**8)
    one = forecast(student, [teacher], LOAD, MACHINE, False)
    two = forecast(student, [teacher], replace(LOAD, rollouts=16), MACHINE, False)
    for name in ("teacher forward", "student forward", "backward", "heads and loss"):
        assert two[name] == pytest.approx(2 * one[name], rel=0.05)
    assert one["teacher forward"] == pytest.approx(3 * one["student forward"], rel=0.05)
    assert one["backward"] == pytest.approx(2 * one["student forward"], rel=0.05)
    assert "teacher forward" not in forecast(student, [], LOAD, MACHINE, False)
    half = {
        name: memory(replace(student, dtype=d), [], LOAD, MACHINE, False)["student"]
        for name, d in (("wide", torch.float32), ("narrow", torch.bfloat16))
    }
    assert half["wide"] == 2 * half["narrow"] == 4 * 11 * 10**7
    assert memory(student, [], LOAD, MACHINE, True)["activations"] < memory(student, [], LOAD, MACHINE, False)["activations"]


def test_forecast_and_measurement_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--cost", "-c", "quickstart.yaml", "--data.batch_size", "8"]) == 0
    shown = capsys.readouterr().out
    assert "8 rollouts of" in shown and "forecast  measured" in shown
    rollout = next(line for line in shown.splitlines() if line.startswith("rollout")).split()
    assert float(rollout[2]) > 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("teacher", ["EMATeacher", "LiveTeacher", "EnsembleTeacher"])
def test_every_network_that_answers_is_counted(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    frozen = {"class_path": "FrozenTeacher", "init_args": {"path": "zoo/addition/teacher"}}
    given = {"class_path": teacher, "init_args": {"teachers": [frozen, frozen]} if teacher == "EnsembleTeacher" else {}}
    words = ["doctor", "--cost", "--no-measure", "-c", "quickstart.yaml", "--model.teacher", json.dumps(given)]
    assert main(words) == 0
    shown = {line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert "teacher forward" in shown
    assert ("teacher" in shown) == (teacher != "LiveTeacher")
