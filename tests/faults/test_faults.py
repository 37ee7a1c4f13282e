"""What goes wrong in runs. Each fault ends in a message that says what it was, and the run that goes on from there ends with
the weights of one that nothing happened to."""

from __future__ import annotations

import json
import re
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.callbacks.recovery import checkpoints
from opd_lightning.cli import main
from opd_lightning.data import Addition
from tests.faults.parts import FAULT
from tests.helpers import same

CONFIG = """
seed_everything: 4
trainer:
  max_steps: 6
  accelerator: cpu
  enable_progress_bar: false
  default_root_dir: {root}/run
  callbacks: [{{class_path: OPDCheckpoint, init_args: {{every_n_steps: 2, keep: 2}}}}, tests.faults.parts.Misfortune]
model:
  student: {{path: {root}/student, lora: {{r: 4, dropout: 0.1}}}}
  teacher: {{class_path: tests.faults.parts.Teacher, init_args: {{path: {root}/teacher}}}}
data:
  prompts: {{class_path: JsonlPrompts, init_args: {{path: {root}/prompts.jsonl}}}}
  held_out: 8
  batch_size: 8
  micro_batch_size: 4
rollout: {{every_n_steps: 2, sampler: {{class_path: tests.faults.parts.Sampler, init_args: {{max_new_tokens: 8}}}}}}
eval: {{every_n_steps: 3, grader: tests.faults.parts.Judge, sampler: {{max_new_tokens: 8}}}}
report: {{controls: {{}}, fields: {{}}}}
"""
GO_ON = "--ckpt_path last"


class Place:
    """A folder with models, prompts, a configuration and a run."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"

    def fit(self, *words: object) -> tuple[int, str]:
        """Exit code and everything that is said; 1 is an error behind the first step, with its notes."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                code, said = main(["fit", "-c", f"{self.root}/run.yaml", *map(str, words), *GO_ON.split()]), ""
            except Exception as error:
                code, said = 1, "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return code, "\n".join([said, *(str(w.message) for w in warned)])

    def weights(self) -> dict[str, torch.Tensor]:
        last = checkpoints(self.run / "checkpoints")[0]
        assert last.name == "step-000006.ckpt"
        found: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
        return found

    def order(self, fault: str, step: int) -> None:
        (self.root / "fault").write_text(f"{fault},{step}")

    def copy(self, root: Path) -> Place:
        shutil.copytree(self.root, root)
        text = (root / "run.yaml").read_text()
        (root / "run.yaml").write_text(text.replace(str(self.root), str(root)))
        return Place(root)


@pytest.fixture(scope="module")
def sound(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Models, prompts and a configuration; nothing has run."""
    root = tmp_path_factory.mktemp("faults") / "before"
    shutil.copytree(pair[0].parent, root)
    rows = Addition(digits=2).rows(40, seed=3)
    (root / "prompts.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    (root / "run.yaml").write_text(CONFIG.format(root=root))
    return Place(root)


@pytest.fixture(scope="module")
def expected(sound: Place) -> dict[str, torch.Tensor]:
    """The weights of a run to which nothing happens."""
    place = sound.copy(sound.root.with_name("finished"))
    assert place.fit()[0] == 0
    return place.weights()


@pytest.fixture(scope="module")
def broken_off(sound: Place) -> Place:
    """A run that an exception ended in step 5, with the checkpoints of steps 2 and 4: the middle of the last refresh."""
    place = sound.copy(sound.root.with_name("broken_off"))
    place.order("callback", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT, str(place.root / "fault"))
        code, said = place.fit()
    assert code == 1 and "a callback of the user's own" in said
    assert f"optimizer step 5; its last checkpoint is {place.run}/checkpoints/step-000004.ckpt: repeat the command" in said
    return place


IN_A_RUN = {
    "callback": r"KeyError: .*user's own",
    "grader": r"ZeroDivisionError: the grader",
    "sampler": r"RuntimeError: the rollout engine ran out",
    "teacher": r"ConnectionError: the teacher does not answer",
    "loss": r"loss is not finite at optimizer step 3 on 1 of 1 ranks. The weights are untouched",
    "gradient": r"gradient is not finite at optimizer step 3, though its loss is. The weights are untouched",
    "logger folder": r"No such file or directory: .*metrics\.csv",
}
"""Fault -> what is said."""


@pytest.fixture
def room() -> Iterator[tuple[int, int]]:
    """Room on the disk again, afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield before
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", [f if f == "gradient" else pytest.param(f, marks=pytest.mark.slow) for f in IN_A_RUN])
def test_in_a_run(fault: str, sound: Place, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = sound.copy(tmp_path / "place")
    place.order(fault, 3)
    monkeypatch.setenv(FAULT, str(place.root / "fault"))
    code, said = place.fit()
    assert code == 1 and re.search(IN_A_RUN[fault], said), said
    if fault != "logger folder":  # which is missed when everything is done
        assert re.search(r"its last checkpoint is .*step-00000[24]\.ckpt: repeat the command with `--ckpt_path last`", said), (
            said
        )
    assert place.fit()[0] == 0
    assert same(place.weights(), expected)


@pytest.mark.slow
def test_a_full_disk(sound: Place, expected: Any, room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = sound.copy(tmp_path / "place")
    place.order("full disk", 3)
    monkeypatch.setenv(FAULT, str(place.root / "fault"))
    _, said = place.fit()
    resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert "checkpoint of step 4 could not be written ([Errno 27] File too large); the one before it stays" in said, said
    assert [f.name for f in (place.run / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    assert place.fit()[0] == 0
    assert same(place.weights(), expected)


# ---- what is found when a run should go on: harm(place) -> how it is mended -----------------------------------------------
def no_teacher(place: Place) -> Callable[[], Any]:
    away = (place.root / "teacher").rename(place.root / "elsewhere")
    return lambda: away.rename(place.root / "teacher")


def another_tokenizer(place: Place) -> Callable[[], Any]:
    return _rewritten(place.root / "teacher/tokenizer.json", lambda text: text.replace('"+"', '"*"'))


def too_few_rows(place: Place) -> Callable[[], Any]:
    """Ids of the student that the teacher has no row for."""
    kept = (place.root / "teacher").rename(place.root / "elsewhere")
    model = AutoModelForCausalLM.from_pretrained(kept)
    model.resize_token_embeddings(model.config.vocab_size - 2)
    shutil.copytree(kept, place.root / "teacher")
    model.save_pretrained(place.root / "teacher")

    def mend() -> None:
        shutil.rmtree(place.root / "teacher")
        kept.rename(place.root / "teacher")

    return mend


def damaged_prompts(place: Place) -> Callable[[], Any]:
    return _rewritten(place.root / "prompts.jsonl", lambda text: text.replace("}", "", 1))


def a_file_in_the_way(place: Place) -> Callable[[], Any]:
    (place.run / "logs").rename(place.run / "elsewhere")
    (place.run / "logs").write_text("a file where a folder should be")
    return (place.run / "logs").unlink


def another_student(place: Place) -> Callable[[], Any]:
    return _rewritten(place.root / "run.yaml", lambda text: text.replace("r: 4", "r: 2"))


def whole_student(place: Place) -> Callable[[], Any]:
    return _rewritten(place.root / "run.yaml", lambda text: text.replace(", lora: {r: 4, dropout: 0.1}", ""))


def another_batch(place: Place) -> Callable[[], Any]:
    return _rewritten(place.root / "run.yaml", lambda text: text.replace("batch_size: 8", "batch_size: 4"))


def _rewritten(file: Path, change: Callable[[str], str]) -> Callable[[], Any]:
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))
    return lambda: file.write_text(text)


ON_RESUMING = {
    no_teacher: r"teacher",
    another_tokenizer: r"different tokenizers: 1 of",
    too_few_rows: r"the teacher has 20 logit rows, but the tokenizer's largest id is 21",
    damaged_prompts: r"prompts\.jsonl:1",
    a_file_in_the_way: r"logs",
    another_student: r"another student",
    whole_student: r"another student",
    another_batch: r"refresh holds 16 rollouts, this run's 8: data\.batch_size",
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", ON_RESUMING, ids=lambda harm: harm.__name__)
def test_on_resuming(harm: Any, broken_off: Place, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = broken_off.copy(tmp_path / "place")
    mend = harm(place)
    code, said = place.fit()
    said += capsys.readouterr().err
    assert code == 2 and re.search(ON_RESUMING[harm], said), (code, said)
    assert (place.run / "checkpoints/step-000004.ckpt").is_file()
    mend()
    assert place.fit()[0] == 0
    assert same(place.weights(), expected)


@pytest.mark.parametrize("damage", [pytest.param("truncated", marks=pytest.mark.slow), "a changed byte"])
def test_a_damaged_checkpoint(damage: str, broken_off: Place, expected: Any, tmp_path: Path) -> None:
    place = broken_off.copy(tmp_path / "place")
    newest = place.run / "checkpoints/step-000004.ckpt"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:  # in the weights, where torch.load sees nothing
        content[content.index(b"/data/0") + 200] ^= 64
    newest.write_bytes(content)
    code, said = place.fit()
    assert code == 0 and re.search(r"step-000004\.ckpt is damaged \(.*\); trying the one before it", said), said
    assert same(place.weights(), expected)
