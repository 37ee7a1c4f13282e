"""What a user types, and what they see."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import commands, configfiles
from opd_lightning.cli import main
from opd_lightning.module import OPDModule


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def small(pair: tuple[Path, Path], tmp_path: Path) -> str:
    """A configuration of a tiny run, as a user would write it."""
    file = tmp_path / "small.yaml"
    file.write_text(
        textwrap.dedent(
            f"""
            # A small run.
            trainer: {{max_steps: 2, accelerator: cpu, default_root_dir: run, enable_progress_bar: false}}
            model:
              student: {{path: {pair[0]}, lora: {{r: 2}}}}
              teacher: {{class_path: FrozenTeacher, init_args: {{path: {pair[1]}}}}}
            data:
              prompts:
                class_path: TaskPrompts
                init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 40}}
              held_out: 8
              batch_size: 8
            rollout: {{sampler: {{max_new_tokens: 5}}}}
            eval: {{every_n_steps: 1, sampler: {{max_new_tokens: 5}}}}
            """
        )
    )
    return str(file)


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must be refused before any work."""
    try:
        code = main(list(words))
    except SystemExit as done:
        code = done.code
    assert code == 2
    return capsys.readouterr().err


# ---- running ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_folder(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", small]) == 0
    run = tmp_path / "run"
    shown = capsys.readouterr().out
    assert "student before" in shown and "teacher" in shown and "report.html" in shown
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"before", "opd", "teacher"}
    assert {"accuracy", "reverse_kl"} <= summary["opd"].keys()
    page = (run / "report.html").read_text()
    assert page.count("Held-out accuracy") == 1 and 'id="data"' in page
    assert not re.search(r"""(?:src|xlink:href|[^:]href)=["']http|url\(["']?http|@import""", page)  # nothing is fetched
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert (run / "logs/version_0/metrics.csv").is_file()


def test_a_new_run_moves_the_old_one_aside_and_last_continues_it(small: str, tmp_path: Path) -> None:
    assert main(["fit", "-c", small]) == 0
    assert main(["fit", "-c", small, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002.ckpt", "step-000003.ckpt"]
    assert not (tmp_path / "run.old-1").exists()
    assert main(["fit", "-c", small]) == 0
    assert (tmp_path / "run.old-1/checkpoints/step-000003.ckpt").is_file()
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002.ckpt"]


def test_last_without_a_checkpoint_starts_from_the_beginning(small: str, tmp_path: Path) -> None:
    assert main(["fit", "-c", small, "--ckpt_path", "last"]) == 0
    assert (tmp_path / "run/checkpoints/step-000002.ckpt").is_file()


def test_values_come_from_defaults_then_checkpoint_then_files_then_flags(small: str, tmp_path: Path) -> None:
    assert main(["fit", "-c", small, "--model.student.lora.r", "3", "--data.batch_size", "4"]) == 0
    checkpoint = str(tmp_path / "run/checkpoints/step-000002.ckpt")
    carried = configfiles.carried(Path(checkpoint))
    assert carried["model"]["student"]["init_args"]["lora"]["r"] == 3
    (tmp_path / "over.yaml").write_text("trainer: {max_steps: 3, gradient_clip_val: 0.5}")
    words = ["--ckpt_path", checkpoint, "-c", "over.yaml", "--trainer.gradient_clip_val", "0.25"]
    assert main(["fit", *words, "--trainer.default_root_dir", "again"]) == 0
    config = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert config["model"]["student"]["init_args"]["lora"]["r"] == 3  # checkpoint over default
    assert config["data"]["batch_size"] == 4
    assert config["trainer"]["max_steps"] == 3  # file over checkpoint
    assert config["trainer"]["gradient_clip_val"] == 0.25  # flag over file


def test_validate_needs_no_yaml_beside_a_checkpoint(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", small]) == 0
    expected = json.loads((tmp_path / "run/summary.json").read_text())["opd"]
    assert main(["validate", "--ckpt_path", "run/checkpoints/step-000002.ckpt", "--trainer.default_root_dir", "v"]) == 0
    assert "eval/reverse_kl" in capsys.readouterr().out
    found = json.loads((tmp_path / "v/eval/history.json").read_text())[-1]
    assert found["reverse_kl"] == pytest.approx(expected["reverse_kl"], rel=1e-6)


def test_generate(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-c", small, "--count", "3", "--out", "out.jsonl"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert records[0]["prompt"] in capsys.readouterr().out
    assert main(["generate", "-c", small, "--prompt", '["12+34=", "1+1="]', "--who", "teacher", "--out", "out.jsonl"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == ["12+34=", "1+1="]


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_loads_in_plain_transformers_and_gives_the_same_logits(
    small: str, merge: bool, pair: Any, tmp_path: Path
) -> None:
    assert main(["fit", "-c", small, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.1"]) == 0
    checkpoint = "run/checkpoints/step-000002.ckpt"
    assert main(["export", "--ckpt_path", checkpoint, "--folder", "out", "--merge", str(merge).lower()]) == 0
    module = OPDModule.load_from_checkpoint(checkpoint)
    ids = module.vocabulary.tokenizer("12+34=", return_tensors="pt").input_ids
    if merge:
        loaded: Any = AutoModelForCausalLM.from_pretrained("out")
    else:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), "out")
    ours = module.student.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(pair[0])(input_ids=ids).logits
    assert (base - ours).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained("out")("12+34=").input_ids == ids[0].tolist()


def test_an_export_to_gguf_says_that_it_is_the_same_model(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", small, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.1"]) == 0
    assert main(["export", "--ckpt_path", "run/checkpoints/step-000002.ckpt", "--folder", "out", "--gguf", "true"]) == 0
    out = capsys.readouterr().out
    assert "exported to out" in out and "log-probs of 256 random tokens equal the student's" in out
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_a_module_loads_from_its_checkpoint_alone(small: str) -> None:
    assert main(["fit", "-c", small]) == 0
    module = OPDModule.load_from_checkpoint("run/checkpoints/step-000002.ckpt")
    assert module.recipe.lora.r == 2
    assert type(module.objective.divergence).__name__ == "ReverseKL"


# ---- extending --------------------------------------------------------------------------------------------------------------


def test_a_users_own_divergence_teacher_and_callback_by_full_path(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the package is touched; the oracle checks the divergence, the run uses all three."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            '''
            import lightning.pytorch as pl
            import torch
            from opd_lightning.models import FrozenTeacher
            from opd_lightning.objectives import Divergence

            class Hellinger(Divergence):
                """Squared Hellinger distance, scaled.

                Args:
                    scale: factor.
                """

                def __init__(self, scale: float = 1.0) -> None:
                    self.scale, self.title = scale, "Hellinger"

                @property
                def curvature(self): return self.scale / 4

                def entry(self, student, teacher):
                    return self.scale * 0.5 * (torch.exp(student / 2) - torch.exp(teacher / 2)) ** 2

                raw = entry

                def advantage(self, student, teacher):
                    return self.scale * 0.5 * torch.expm1((teacher - student) / 2)

                def value(self, student, teacher):
                    return self.scale * 0.5 * torch.expm1((teacher - student) / 2) ** 2

            class ColdTeacher(FrozenTeacher):
                """A frozen teacher with sharper laws.

                Args:
                    path: of the model.
                    temperature: divides its logits.
                """

                asked = 0

                def __init__(self, path: str, temperature: float = 0.5) -> None:
                    super().__init__(path)
                    self.temperature = temperature

                def laws(self, student, text, vocab):
                    ColdTeacher.asked += 1
                    laws = super().laws(student, text, vocab)
                    return type(laws)(laws.hidden, lambda h: laws.head(h) / self.temperature, laws.vocab)

            class Count(pl.Callback):
                """Counts optimizer steps."""

                steps = 0

                def on_before_optimizer_step(self, trainer, module, optimizer):
                    Count.steps += 1
            '''
        )
    )
    (tmp_path / "own.yaml").write_text(
        textwrap.dedent(
            """
            model:
              objective:
                class_path: Objective
                init_args: {divergence: {class_path: mine.Hellinger, init_args: {scale: 2.0}}}
              teacher: {class_path: mine.ColdTeacher, init_args: {temperature: 0.25}}
            trainer:
              callbacks+: [mine.Count]
            """
        )
    )
    teacher = yaml.safe_load(Path(small).read_text())["model"]["teacher"]["init_args"]["path"]
    assert main(["fit", "-c", small, "-c", "own.yaml", "--model.teacher.path", teacher]) == 0
    import mine

    from opd_lightning.inspect.oracle import TabularWorld
    from opd_lightning.objectives import Objective, SampledToken

    assert mine.Count.steps == 2
    assert mine.ColdTeacher.asked >= 4  # two steps and the measurements
    world = TabularWorld.random(vocab=4, horizon=2, seed=0)
    for objective in (Objective(mine.Hellinger(2.0)), Objective(mine.Hellinger(2.0), SampledToken())):
        error = (world.moments_of(objective).mean - world.declared_gradient(objective)).abs().max()
        assert error < 1e-10
    again = OPDModule.load_from_checkpoint("run/checkpoints/step-000002.ckpt")
    assert again.objective.divergence.scale == 2.0


# ---- messages ---------------------------------------------------------------------------------------------------------------


def test_a_misspelt_key_names_the_nearest(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("typo.yaml").write_text("data: {bach_size: 4}")
    assert "did you mean 'batch_size'" in refused("fit", "-c", small, "-c", "typo.yaml", capsys=capsys)
    assert "did you mean 'divergence'" in refused("fit", "-c", small, "--model.objective.divergense=ReverseKL", capsys=capsys)
    assert "did you mean '--rollout.passes'" in refused("fit", "-c", small, "--rolout.passes", "2", capsys=capsys)
    assert "'k' belongs to" in refused("fit", "-c", small, "--model.objective.support.k", "4", capsys=capsys)


def test_a_misspelt_class_names_the_nearest(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("fit", "-c", small, "--model.objective.divergence=ReversKL", capsys=capsys)
    assert "did you mean 'ReverseKL'" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-c", "quikstart.yaml"], "Did you mean quickstart.yaml"),
        (["-c", "quickstart.yaml", "--data.batch_size", "many"], "data.batch_size"),
        (["--model.teacher.path", "zoo/addition/techer"], "Bundled models: zoo/addition/student, zoo/addition/teacher"),
        (
            [
                "--model.objective.support=TopK",
                "--model.objective.support.k=1",
                "--model.objective.support.closure=renormalize",
            ],
            "Write instead",
        ),
        (["--model.teacher=AdapterOffTeacher"], "model.student.lora"),
        (["--data.prompts=JsonlPrompts", "--data.prompts.path=none.jsonl"], "no such file"),
        (["--rollout.rollouts_per_prompt", "5"], "must divide data.batch_size=32"),
        (["--trainer.precision", "bf16-true"], "bf16-mixed"),
    ],
)
def test_wrong_input_is_refused_with_the_key_to_change(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused("fit", *words, "--trainer.accelerator", "cpu", capsys=capsys)
    assert expected in message
    assert "Traceback" not in message


def test_a_refused_run_leaves_the_old_one_alone(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", small]) == 0
    refused("fit", "-c", small, "--model.objective.temperature", "-1", capsys=capsys)
    assert (tmp_path / "run/summary.json").is_file()
    assert not (tmp_path / "run.old-1").exists()


# ---- configuration files ----------------------------------------------------------------------------------------------------


def test_extends_are_laid_below_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.yaml").write_text("# A.\nx: 1")
    (tmp_path / "b.yaml").write_text("# extends: sub/a.yaml\nx: 2")
    (tmp_path / "c.yaml").write_text("# C, on top.\n# extends: b.yaml, methods/gkd.yaml\nx: 3")
    files = configfiles.with_parents(configfiles.find("c.yaml"))
    assert [f.name for f in files] == ["a.yaml", "b.yaml", "gkd.yaml", "c.yaml"]
    assert configfiles.summary(files[-1]) == "C, on top."
    (tmp_path / "sub/a.yaml").write_text("# extends: ../b.yaml\nx: 1")
    with pytest.raises(ValueError, match="circle"):
        configfiles.with_parents(configfiles.find("c.yaml"))


def test_lists_and_reports(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in configfiles.shipped())
    assert main(["zoo", "list"]) == 0
    assert "zoo/addition/teacher" in capsys.readouterr().out
    assert main(["fit", "-c", small]) == 0
    Path("run/report.html").unlink()
    assert main(["report", "run"]) == 0
    assert Path("run/report.html").is_file()
    assert main(["report", "elsewhere"]) == 2


@pytest.mark.parametrize("words", [["configs"], ["configs", "--help"], ["fit", "--help"]], ids=" ".join)
def test_a_reader_who_leaves_is_no_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``opd configs | head -3``: nothing on stderr, and the status of a command that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(words) == 141
    assert capfd.readouterr().err == ""


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> int:
        raise BrokenPipeError("a server went away")

    monkeypatch.setitem(commands.OWN_PARSER, "configs", breaks)
    with pytest.raises(BrokenPipeError, match="a server went away"):
        main(["configs"])


@pytest.mark.parametrize(
    "words", [["--help"], ["fit", "--help"], ["fit", "--model.objective.help", "Objective"], ["zoo", "--help"]]
)
def test_help_explains(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    shown = capsys.readouterr().out
    if words == ["fit", "--help"]:
        for text in (
            "rollouts of one optimizer step, over all devices",
            "completions of every prompt",
            "Trains the first steps from another source with another objective",
        ):
            assert text in " ".join(shown.split())


def test_tensorboard_gets_the_same_curves_by_a_flag(small: str, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    table = "{class_path: CSVLogger, init_args: {save_dir: run, name: logs}}"
    board = "{class_path: TensorBoardLogger, init_args: {save_dir: tb}}"
    always = "[{class_path: EntropyCollapse, init_args: {floor: 99.0, patience: 1}}]"
    assert main(["fit", "-c", small, "--trainer.logger", f"[{table}, {board}]", "--alarms.alarms", always]) == 0
    (events,) = (tmp_path / "tb").rglob("events.*")
    found = reader.EventAccumulator(str(events)).Reload()
    logged: dict[str, list[tuple[int, float]]] = {}
    with (tmp_path / "run/logs/version_0/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key in row.keys() - {"step", "epoch"}:
                if row[key]:
                    logged.setdefault(key, []).append((int(row["step"]), float(row[key])))
    scalars = {
        tag: [(e.step, e.value) for e in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
        if tag not in ("epoch", "hp_metric")
    }
    assert {"alarm/entropy_collapse", "eval/accuracy", "train/reverse_kl"} <= scalars.keys() == logged.keys()
    for key, points in logged.items():
        assert [step for step, _ in scalars[key]] == [step for step, _ in points], key
        assert [x for _, x in scalars[key]] == pytest.approx([x for _, x in points], rel=1e-5), key
