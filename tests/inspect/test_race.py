"""A race: what it runs, what it does not run again, what it says, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.cli import main, read
from opd_lightning.inspect import courses, race, standings, subrun
from opd_lightning.inspect.runs import curves
from opd_lightning.inspect.standings import DONE, FAILED, Result

BASE = """
# A small run.
trainer:
  max_steps: 2
  accelerator: cpu
  callbacks: [{{class_path: OPDCheckpoint, init_args: {{every_n_steps: 1, keep: 0}}}}, CompletionTable]
model:
  student: {{path: {student}}}
  teacher: {{class_path: FrozenTeacher, init_args: {{path: {teacher}}}}}
data:
  prompts: {{class_path: TaskPrompts, init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 40}}}}
  held_out: 8
  batch_size: 4
rollout: {{sampler: {{max_new_tokens: 5}}}}
eval: {{sampler: {{max_new_tokens: 5}}}}
report: {{controls: {{sft: methods/seqkd.yaml}}, fields: {{kl: sft.reverse_kl}}}}
"""
LOST = "# A teacher that is not there.\nmodel: {teacher: {class_path: FrozenTeacher, init_args: {path: nowhere/at/all}}}\n"
DEGENERATE = """
# Nothing to learn from.
model:
  objective:
    init_args: {support: {class_path: TopK, init_args: {k: 1, by: student, closure: renormalize}}}
"""


@pytest.fixture(scope="module")
def work(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base configuration, methods that fail, and a finished race of two methods and two seeds."""
    root = tmp_path_factory.mktemp("race")
    (root / "small.yaml").write_text(BASE.format(student=pair[0], teacher=pair[1]))
    (root / "lost.yaml").write_text(LOST)
    (root / "degenerate.yaml").write_text(DEGENERATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(words("methods/opd.yaml", "methods/seqkd.yaml")) == 0
    return root


@pytest.fixture
def there(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def words(*methods: str, seeds: tuple[str, ...] = ("0", "1"), folder: str = "race") -> list[str]:
    asked = ["--methods", *methods, "--seeds", *seeds, "--folder", folder]
    return ["race", "-c", "small.yaml", *asked, "--eval.every_n_steps", "1"]


def rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    with (folder / "race.csv").open(encoding="utf-8") as file:
        return {(row["method"], row["seed"]): row for row in csv.DictReader(file)}


def written(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in sorted(folder.rglob("summary.json"))}


# ---- running ----------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_runs(work: Path) -> None:
    folder, table = work / "race", rows(work / "race")
    assert set(table) == {(method, seed) for method in ("opd", "seqkd") for seed in ("0", "1")}
    for (method, seed), row in table.items():
        run = folder / method / f"seed-{seed}"
        after = json.loads((run / "summary.json").read_text())[standings.LABEL]
        assert row["status"] == "done"
        assert float(row["accuracy"]) == after["accuracy"] and float(row["reverse_kl"]) == after["reverse_kl"]
        assert 2 * 4 <= float(row["training_tokens"]) <= 2 * 4 * 5
        assert float(row["seconds"]) > 0
        assert not (run / "samples.jsonl").exists() and not (run / "controls").exists()  # tables and controls are off
    assert table["opd", "0"]["reverse_kl"] != table["opd", "1"]["reverse_kl"]
    shown = (folder / "race.md").read_text()
    for method in ("opd", "seqkd"):
        found = [float(table[method, seed]["reverse_kl"]) for seed in ("0", "1")]
        assert f"{statistics.fmean(found):.4f} ± {statistics.stdev(found):.4f}" in shown
        assert f"- {method}: {table[method, '0']['target']}" in shown
    assert "student before" in shown and "teacher" in shown and "8 completions" in shown
    assert (folder / "race.png").stat().st_size > 10_000
    assert "reverse KL" in (folder / "race.svg").read_text()


def test_the_way_there_is_kept_with_tokens_and_seconds(work: Path, tmp_path: Path) -> None:
    folder, table = work / "race", rows(work / "race")
    with (folder / "race_courses.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["step"]) for r in found] == [(*run, step) for run in table for step in "012"]
    for (method, seed), row in table.items():
        start, middle, end = (r for r in found if (r["method"], r["seed"]) == (method, seed))
        assert (start["training_tokens"], start["seconds"]) == ("0.0", "0")
        assert 4 <= float(middle["training_tokens"]) <= 4 * 5 and 0.0 < float(middle["seconds"]) < float(end["seconds"])
        assert {key: end[key] for key in ("reverse_kl", "accuracy")} == {key: row[key] for key in ("reverse_kl", "accuracy")}
        assert float(end["training_tokens"]) == float(row["training_tokens"]) and end["seconds"] == row["seconds"]
    logged = curves(folder / "opd/seed-0")
    assert logged["time/evaluation"][1][1] > 0.0  # before the second step, and left out
    assert float(table["opd", "0"]["seconds"]) < sum(value for _, value in logged["train/step_seconds"])
    assert (folder / "race_courses.png").stat().st_size > 10_000
    (tmp_path / "run/eval").mkdir(parents=True)
    measured = [{"step": step, "who": "student", "reverse_kl": 1.0} for step in (0, 5)]
    (tmp_path / "run/eval/history.json").write_text(json.dumps(measured))
    courses.write(tmp_path, [("opd", 0, tmp_path / "run")], draw=True)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]  # before and after alone: the table says it all


@pytest.mark.slow
def test_finished_runs_stay_an_interrupted_one_goes_on_and_a_failing_one_stops_nobody(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command: seqkd is finished, opd was interrupted after its first step, and the new method's teacher is lost."""
    cut = there / "race/opd/seed-1"
    whole = json.loads((cut / "summary.json").read_text())
    (cut / "summary.json").unlink()
    (cut / "checkpoints/step-000002.ckpt").unlink()
    before = written(there / "race")
    assert main(words("lost.yaml", "methods/opd.yaml", "methods/seqkd.yaml", seeds=("1",))) == 1
    shown = capsys.readouterr()
    assert "1 of 3 runs are finished already" in shown.out
    after = written(there / "race")
    assert {name: after[name] for name in before} == before
    assert json.loads((cut / "summary.json").read_text()) == whole
    assert len(list((cut / "logs").iterdir())) == 2  # it went on in its folder
    table = rows(there / "race")
    assert {key[0]: row["status"] for key, row in table.items()} == {"opd": "done", "seqkd": "done", "lost": "failed"}
    assert "nowhere/at/all" in table["lost", "1"]["error"]
    assert "lost, seed 1 failed" in shown.err and "nowhere/at/all" in (there / "race/race.md").read_text()
    assert "0 of 1 (1 failed)" in shown.out


def test_only_the_same_configuration_counts_as_finished(there: Path, tmp_path: Path) -> None:
    def planned(flags: tuple[str, ...] = (), **changes: Any) -> race.Run:
        asked = ("--eval.every_n_steps", "1", *flags)
        settings = race.Settings(["small.yaml"], ["methods/seqkd.yaml"], [0], Path("race"), flags=asked, **changes)
        return race.plan(settings, read)[0]

    assert planned().finished and planned(max_steps=2).finished
    for changed in ({"max_steps": 3}, {"flags": ("--model.optimizer", "SGD", "--model.optimizer.lr", "0.1")}):
        assert not planned(**changed).finished
    assert planned().result().status == DONE
    shutil.copytree(planned().folder, tmp_path / "burst")
    summary = json.loads((tmp_path / "burst/summary.json").read_text())
    summary[standings.LABEL]["reverse_kl"] = float("nan")
    (tmp_path / "burst/summary.json").write_text(json.dumps(summary))
    burst = replace(planned(), folder=tmp_path / "burst").result()
    assert burst.status == FAILED and "reverse_kl=nan" in burst.error and not burst.after


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("Traceback\n  x\nFloatingPointError: not finite\n  Lower the rate\n", 1, "FloatingPointError: not finite"),
        ("opd: ValueError: data.x=1: no\n(the whole traceback: OPD_TRACEBACK=1)\n", 2, "ValueError: data.x=1: no"),
        ("half a wor", -9, "killed by SIGKILL (out of memory?)"),
        ("strange end\n", 1, "strange end"),
        ("", 3, "exit code 3"),
    ],
)
def test_the_last_error_line(text: str, code: int, expected: str) -> None:
    assert subrun.last_error(text, code) == expected


@pytest.mark.slow
def test_sigterm_stops_the_race_and_its_run(there: Path) -> None:
    command = [sys.executable, "-m", "opd_lightning", *words("methods/opd.yaml", seeds=("0", "1"), folder="stopped")]
    process = subprocess.Popen([*command, "--max_steps", "5000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = there / "stopped/opd/seed-0/checkpoints"
    deadline = time.monotonic() + 100
    while not list(saved.glob("*.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    count = len(list(saved.glob("*.ckpt")))
    time.sleep(0.3)
    assert len(list(saved.glob("*.ckpt"))) == count  # the run has ended too
    assert "resume with --ckpt_path last" in (there / "stopped/opd/seed-0.log").read_text()
    assert {row["status"] for row in rows(there / "stopped").values()} == {"open"}


# ---- refusing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (words("methods/opdd.yaml"), ["opdd.yaml", "Did you mean methods/opd.yaml", "methods/seqkd.yaml"]),
        (words(), ["--methods: none given", "methods/gkd.yaml"]),
        (words("methods/opd.yaml", seeds=()), ["--seeds: none given", "--seeds 0 1 2"]),
        (words("methods/opd.yaml", seeds=("zero",)), ["--seeds", "zero"]),
        (words("methods/opd.yaml", seeds=("-1",)), ["--seeds -1", "between 0 and"]),
        ([*words("methods/opd.yaml"), "--max_steps", "0"], ["--max_steps 0", "at least 1"]),
        ([*words("methods/opd.yaml"), "--data.bach_size", "4"], ["did you mean '--data.batch_size'", "no run was started"]),
        ([*words("methods/opd.yaml"), "--data.held_out", "0"], ["data.held_out"]),
        (words("methods/opd.yaml", "degenerate.yaml"), ["degenerate.yaml over small.yaml", "Write instead"]),
        ([*words("methods/seqkd.yaml"), "--rollout.source", "StudentSource"], ["expected gradient zero"]),
        ([*words("methods/opd.yaml"), "-c", "smal.yaml"], ["smal.yaml", "no configuration"]),
    ],
    ids=lambda value: None,
)
def test_bad_input_is_refused_before_any_run(
    given: list[str], expected: list[str], there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["nowhere" if word == "race" and place else word for place, word in enumerate(given)]
    try:
        code = main(given)
    except SystemExit as done:
        code = done.code
    assert code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (there / "nowhere").exists()


def test_two_methods_of_one_name_are_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "opd.yaml").write_text("# Mine.\n")
    assert main(words("methods/opd.yaml", "opd.yaml")) == 2
    assert "both called 'opd'" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["race", "--help"])
    assert "opd race -c quickstart.yaml --methods" in capsys.readouterr().out


# ---- tables -----------------------------------------------------------------------------------------------------------------


def result(method: str, seed: int, **after: float) -> Result:
    found = {"after": after, "before": {"accuracy": 0.1 * seed}, "teacher": {"accuracy": 0.9}}
    return Result(method, seed, f"target of {method}", 100, DONE, **found)


def test_the_best_accuracy_leads_and_failures_are_counted() -> None:
    results = [result("a", 0, accuracy=0.5), result("a", 1, accuracy=0.7), result("b", 0, accuracy=0.8)]
    results += [Result("b", 1, "", 100, FAILED, "ValueError: no"), Result("c", 0, "", 100), Result("c", 1, "", 100)]
    found = standings.standings(results)
    assert [row.name for row in found] == ["b", "a", "c"]
    assert [row.seeds for row in found] == ["1 of 2 (1 failed)", "2", "0 of 2 (2 open)"]
    assert found[1].mean("accuracy") == pytest.approx(0.6)
    assert found[1].deviation("accuracy") == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert found[0].deviation("accuracy") is None
    before, teacher = standings.references(results)
    assert sorted(before.values["accuracy"]) == [0.0, 0.1]
    assert teacher.mean("accuracy") == pytest.approx(0.9)
    shown = standings.markdown(results)
    assert "60.0 ± 14.1 %" in shown and "- b, seed 1: ValueError: no" in shown


def test_without_a_grader_the_lowest_divergence_leads(tmp_path: Path) -> None:
    results = [result("a", 0, reverse_kl=0.02), result("b", 0, reverse_kl=0.01)]
    assert [row.name for row in standings.standings(results)] == ["b", "a"]
    standings.write(tmp_path, results, draw=True)
    assert (tmp_path / "race.png").is_file()


def test_unequal_budgets_are_said() -> None:
    results = [result("a", 0, accuracy=0.5), Result("b", 0, "", 50)]
    assert "**Unequal budgets**, completions a run: a 100; b 50" in standings.markdown(results)
