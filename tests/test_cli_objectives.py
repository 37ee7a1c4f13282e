"""Configurations in terms of what they train: checked and compared without loading weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_lightning import configfiles
from opd_lightning.cli import main, read
from opd_lightning.inspect.setups import differences
from opd_lightning.models import Student


@pytest.fixture(autouse=True)
def without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, where loading a model is an error."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Student, "weights", forbidden)
    monkeypatch.setattr("opd_lightning.models.teachers.base.load_model", forbidden)


def run(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as done:
        return int(done.code or 0)


# ---- validate-config --------------------------------------------------------------------------------------------------------
def test_an_accepted_configuration_says_what_it_descends_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "runs/quickstart"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("an old run")
    assert run("validate-config", "-c", "quickstart.yaml", "--model.objective.support", "SampledToken") == 0
    shown = capsys.readouterr().out.splitlines()
    target = read(["-c", "quickstart.yaml", "--model.objective.support", "SampledToken"]).module.objective.declared_target
    assert shown == [f"this objective descends: {target}"]
    assert "sampled token" in shown[0]
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["config.yaml"]  # nothing moved aside, nothing written


def test_a_cold_start_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate-config", "-c", "quickstart.yaml", "--cold_start.steps", "5") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("cold start descends: forward KL from the writer of the text")
    assert second.startswith("this objective descends: token-level reverse KL")


TOP_K = ("--model.objective.support", "TopK")
REFUSED = {
    "renormalised top-1": (
        [*TOP_K, "--model.objective.support.k", "1", "--model.objective.support.closure", "renormalize"],
        "loss and gradient are exactly 0",
        "p_1 / p_1 = 1",
        "support.k: 16",
    ),
    "raw top-k": (
        [*TOP_K, "--model.objective.support.k", "4", "--model.objective.support.closure", "raw"],
        "descends the student's own mass",
        "grad sum_S p",
        "support.closure: tail",
    ),
    "sampled forward KL": (
        ["--model.objective.divergence", "ForwardKL", "--model.objective.support", "SampledToken"],
        "importance weight",
        "sum_v q_v^2 / p_v",
        "support: FullVocab",
    ),
    "own text": (
        ["-c", "methods/seqkd.yaml", "--rollout.source", "StudentSource"],
        "the student imitates itself",
        "grad 1 = 0",
        "rollout.source: TeacherSource",
    ),
    "others' text": (
        ["-c", "methods/gkd.yaml", "--model.objective.credit", "ReturnToGo"],
        "completions that the student did not write",
        "y drawn from p",
        "credit: Immediate",
    ),
    "stale text": (
        ["--model.objective.credit", "ReturnToGo", "--rollout.every_n_steps", "4"],
        "a refresh serves 4 optimizer steps",
        "the p of this step",
        "rollout.every_n_steps: 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_cause_formula_and_replacement(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, cause, formula, remedy = REFUSED[case]
    assert run("validate-config", *words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert cause in told.err
    assert any(line.startswith("  Formula: ") and formula in line for line in lines)
    assert any(line.startswith("  Write instead: ") and remedy in line for line in lines)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-c", "quikstart.yaml"], "Did you mean quickstart.yaml"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--rolout.passes", "2"], "did you mean '--rollout.passes'"),
        (["--model.teacher", "AdapterOffTeacher"], "model.student.lora"),
        (["--cold_start.steps", "3", "--rollout.every_n_steps", "2"], "inside a refresh"),
    ],
)
def test_a_wrong_key_is_refused_as_by_fit(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate-config", *words) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in configfiles.shipped() if n.startswith(("strategies/", "quickstart"))])
def test_shipped_configurations_are_accepted_whatever_devices_there_are(name: str) -> None:
    assert run("validate-config", "-c", name) == 0


# ---- diff -------------------------------------------------------------------------------------------------------------------
def test_only_what_differs_is_shown_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("diff", "methods/opd.yaml", "methods/gkd.yaml") == 0
    shown = capsys.readouterr().out
    rows = {line[:12].strip(): line for line in shown.splitlines()}
    assert "StudentSource" in rows["states"] and "MixtureSource(first=StudentSource" in rows["states"]
    assert "ReverseKL" in rows["divergence"] and "GeneralizedJSD(beta=0.1" in rows["divergence"]
    assert not {"support", "credit", "teacher", "steps"} & rows.keys()
    assert shown.count("this objective descends: token-level") == 2
    assert "JSD(beta=0.1)" in shown


def test_rows_name_the_argument_that_differs(tmp_path: Path) -> None:
    """Defaults count, parents are read, and inside one class only what differs is a row."""
    (tmp_path / "a.yaml").write_text(
        "# A.\n# extends: methods/opd.yaml\nmodel: {objective: {init_args: {support: {class_path: TopK, init_args: {k: 8}}}}}"
    )
    (tmp_path / "b.yaml").write_text(
        "# B, on top of A.\n# extends: a.yaml\n"
        "model:\n  objective: {init_args: {temperature: 2.0, support: {class_path: TopK, init_args: {k: 16}}}}\n"
        "  optimizer: {class_path: SGD, init_args: {lr: 0.5}}\n"
        "trainer: {max_steps: 7}\nrollout: {every_n_steps: 2, sampler: {top_p: 0.9}}\n"
    )
    rows = {name: values for name, *values in differences(read(["-c", "a.yaml"]), read(["-c", "b.yaml"]))}
    optimizer = rows.pop("optimizer")
    assert optimizer[0] == "null" and optimizer[1].startswith("SGD(lr=0.5")
    assert rows == {
        "support.k": ["8", "16"],
        "temperature": ["1.0", "2.0"],
        "sampler.top_p": ["1.0", "0.9"],
        "steps": ["100", "7"],
        "rollout.every_n_steps": ["1", "2"],
    }


def test_equal_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "same.yaml").write_text("# The same.\n# extends: quickstart.yaml\n")
    assert run("diff", "quickstart.yaml", "same.yaml") == 0
    assert "quickstart.yaml and same.yaml are the same run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer: [1", "Problems parsing config"),
        ("data: {bach_size: 4}", "did you mean 'batch_size'"),
        ("model: {objective: {init_args: {temperature: -1.0}}}", "the temperature must be greater than 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert run("diff", "quickstart.yaml", "wrong.yaml") == 2
    told = capsys.readouterr()
    assert expected in told.err
    assert "the configuration that cannot be used is wrong.yaml" in told.err
    assert told.out == ""
    assert run("diff", "quickstart.yaml") == 2


@pytest.mark.parametrize("verb", ["diff", "validate-config"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"opd {verb} " in capsys.readouterr().out.partition("example:")[2]


def test_the_same_as_a_program(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "opd_lightning", "validate-config", "-c", "quickstart.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("this objective descends: ")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_catalogue_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("configs", "--methods") == 0
    table = capsys.readouterr().out
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert head[0] == "method" and {"states", "divergence", "support", "credit", "route", "declared target"} <= set(head)
    shipped = {Path(name).stem for name in configfiles.shipped() if name.startswith("methods/")}
    assert {row[0] for row in rows} == shipped and len(shipped) >= 30
    assert all(all(row) for row in rows)
    page = (Path(__file__).resolve().parents[1] / "configs/methods/README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in shipped)
