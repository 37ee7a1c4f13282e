"""Phases add up to the time that has passed, and each second counts once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from opd_lightning import clock as module
from opd_lightning.callbacks.progress import time_table
from opd_lightning.clock import Clock
from opd_lightning.metrics.catalog import define


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_an_inner_phase_stops_the_outer_one(ticks: list[float]) -> None:
    clock = Clock()
    ticks[0] = 1.0
    with clock.phase("step"):
        ticks[0] = 3.0
        with clock.phase("loss"):
            ticks[0] = 7.0
        ticks[0] = 15.0
    ticks[0] = 31.0
    assert clock.read() == {"other": 17.0, "step": 10.0, "loss": 4.0}


def test_a_whole_phase_counts_what_is_inside(ticks: list[float]) -> None:
    clock = Clock()
    with clock.phase("evaluation", whole=True):
        ticks[0] = 1.0
        with clock.phase("loss"):
            ticks[0] = 3.0
        ticks[0] = 5.0
    assert clock.read() == {"other": 0.0, "evaluation": 5.0}
    clock.restart()
    ticks[0] = 6.0
    assert clock.read() == {"other": 1.0}


def test_a_fit_is_accounted_for_to_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    words = ["--trainer.max_steps", "2", "--data.batch_size", "8", "--eval.every_n_steps", "0", "--report.controls", "{}"]
    assert main(["fit", "-c", "quickstart.yaml", *words, "--trainer.default_root_dir", "run"]) in (0, None)
    took = time.perf_counter() - began
    (log,) = Path("run").rglob("metrics.csv")
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    columns = [i for i, key in enumerate(header) if key.startswith("time/")]
    assert {"time/rollout", "time/student_forward", "time/heads_and_loss", "time/backward", "time/optimizer"} <= set(header)
    assert all(define(header[i]) for i in columns)
    steps = [row for row in rows if row[columns[0]]]
    seconds = header.index("train/step_seconds")
    for row in steps:
        assert sum(float(row[i]) for i in columns if row[i]) == pytest.approx(float(row[seconds]), rel=0.05, abs=0.02)
    assert sum(float(row[seconds]) for row in steps) < took


def test_the_table_is_sorted_and_sums_to_one_hundred() -> None:
    lines = time_table({"a": 1.0, "b": 3.0}).splitlines()
    assert lines[1].split() == ["b", "3.0", "75", "%"] and lines[2].split() == ["a", "1.0", "25", "%"]
