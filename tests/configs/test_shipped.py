"""Every configuration that ships parses, prints and runs two steps with tiny models."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from opd_lightning import configfiles
from opd_lightning.cli import main
from opd_lightning.models import Student
from opd_lightning.models.tiny import save_tiny

NAMES = [name for name in configfiles.shipped() if name != "base.yaml"]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny pair with a chat template and an alphabet that covers every shipped prompt."""
    out = []
    for name, hidden in (("student", 16), ("teacher", 32)):
        folder = save_tiny(
            tmp_path_factory.mktemp("chat") / name,
            characters="".join(map(chr, range(32, 127))) + "\n",
            hidden=hidden,
            max_length=4096,
        )
        tokenizer = Student(str(folder)).tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
        out.append(str(folder))
    return out


def tiny(name: str, pair: list[str], root: Path) -> list[str]:
    """Overrides that leave the file's own choices alone and make them small."""
    text = "\n".join(f.read_text() for f in configfiles.with_parents(configfiles.find(name)))
    words = ["--trainer.default_root_dir", str(root), "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    words += ["--report.controls", "{}", "--report.fields", "{}", "--data.batch_size", "4", "--data.micro_batch_size", "0"]
    words += ["--rollout.sampler.max_new_tokens", "4", "--eval.sampler.max_new_tokens", "4"]
    words += ["--trainer.enable_progress_bar", "false"]
    if "NewStudent" not in text:
        words += ["--model.student.path", pair[0]]
        teacher = re.findall(r"^\s+teacher: *(?:\{?\s*class_path: *)?(\w+)", text, re.MULTILINE)
        if not teacher or teacher[-1] in ("FrozenTeacher", "CheckpointTeacher"):
            words += ["--model.teacher.path", pair[1]]
        if teacher and teacher[-1] == "RoutedTeacher":
            expert = {"class_path": "FrozenTeacher", "init_args": {"path": pair[1]}}
            words += ["--model.teacher.teachers", json.dumps({"addition": expert})]
    if "rollouts_per_prompt" in text:
        words += ["--rollout.rollouts_per_prompt", "2"]
    if "keep_layers" in text:
        words += ["--model.student.keep_layers", "1"]
    if not re.search(r"\bprompts:", text):  # those of base.yaml
        words += ["--data.prompts.size", "128"]
    for key in ("prompts", "held_out_prompts"):
        if f" {key}: {{class_path: TaskPrompts" in text:
            words += [f"--data.{key}.size", "16"]
    return words


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("strategies/")])
def test_runs_two_steps(name: str, chatty: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", name, *tiny(name, chatty, tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run/checkpoints/step-000002.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert (tmp_path / "run/config.yaml").is_file()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("strategies/")])
def test_strategies_run_two_steps(name: str, chatty: list[str], tmp_path: Path) -> None:
    words = ["fit", "-c", name, *tiny(name, chatty, tmp_path / "run")]
    config = yaml.safe_load(configfiles.find(name).read_text())["trainer"]
    if config["strategy"] != "auto":
        words += ["--trainer.devices", "2"]
    if config["accelerator"] == "gpu":
        words += ["--trainer.precision", config["precision"]]
    done = subprocess.run(
        [sys.executable, "-m", "opd_lightning", *words], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    if config["strategy"].startswith("deepspeed"):  # refused with the reason, before anything runs
        if importlib.util.find_spec("deepspeed") is not None:
            pytest.skip("needs NVIDIA GPUs")
        assert done.returncode == 2 and "`pip install deepspeed`" in done.stderr and "fsdp2" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/checkpoints/step-000002.ckpt").is_file()


@pytest.mark.parametrize("name", configfiles.shipped())
def test_prints_a_configuration_that_prints_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(["fit", *words, "--print_config"])
        assert done.value.code == 0
        return capsys.readouterr().out

    first = printed("-c", name)
    (tmp_path / "again.yaml").write_text(first)
    assert yaml.safe_load(printed("-c", "again.yaml")) == yaml.safe_load(first)


@pytest.mark.parametrize("name", configfiles.shipped())
def test_has_a_line_for_the_list_and_keeps_the_cap(name: str) -> None:
    file = configfiles.shipped()[name]
    assert len(configfiles.summary(file)) > 20
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 25
