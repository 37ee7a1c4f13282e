"""Both prompts side by side, with what differs beside the information."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_lightning.cli import main, read
from opd_lightning.inspect.pairs import columns, prompt_differences
from opd_lightning.models import Student
from opd_lightning.models.tiny import save_tiny

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if thinking %}<think>{% endif %}[assistant]\n"
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


def model(folder: Path, chat: str = CHAT, eos: str | None = None) -> str:
    save_tiny(folder, characters=ALPHABET, hidden=16)
    tokenizer = Student(str(folder)).tokenizer()
    tokenizer.chat_template = chat
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.save_pretrained(folder)
    return str(folder)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect-pair", "-c", "methods/opd.yaml", "--width", "100", *words]) == 0
    return capsys.readouterr().out


def test_information_is_marked_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = model(tmp_path / "one")
    out = shown(capsys, "--model.student.path", both, "--model.teacher.path", both,
                "--data.template", "ChatTemplate", "--data.teacher_template", "AnswerOnly", "--rows", "2")  # fmt: skip
    rows = read(["-c", "methods/opd.yaml"]).data.prompt_set.rows()
    assert "row 0" in out and "row 1" in out and "row 2" not in out
    for row in rows[:2]:
        assert f"The final answer is {row['answer']}.[assistant]" in out
        assert f"[user]{row['prompt']}[assistant]" in out
    assert "!" not in out
    assert "|" in out


def test_template_thinking_and_eos_differences_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = model(tmp_path / "ours")
    theirs = model(tmp_path / "theirs", CHAT.replace("[", "<").replace("]", ">"), eos="~")
    out = shown(capsys, "--model.student.path", ours, "--model.teacher.path", theirs, "--data.template", "ChatTemplate",
                "--data.teacher_template", "ChatTemplate", "--data.teacher_template.options", "{thinking: true}")  # fmt: skip
    assert "! thinking mode: <think> stands 0 times in the student's prompt and 1 times in the teacher's" in out
    assert "! EOS: ~ ends a text for teacher alone" in out
    assert "! EOS: <eos> ends a text for the student alone" in out
    assert "! template: teacher was trained with another chat template" in out
    assert "! template options: {} for the student, {'thinking': True} for the teacher" in out


def test_a_teacher_without_information_and_one_of_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--data.teacher_template", "Hint")
    assert "the teacher has nothing to be told" in out and "(nothing)" in out
    completion = read(["-c", "methods/opd.yaml"]).data.prompt_set.rows()[0]["completion"]
    assert completion[:20] in shown(capsys, "--data.teacher_template", "SiblingSuccess")
    assert "the teacher reads what the student reads" in shown(capsys)


def test_a_teacher_with_another_tokenizer_reads_its_own_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = model(tmp_path / "ours")
    save_tiny(tmp_path / "theirs", characters=ALPHABET[:90], hidden=16)
    tokenizer = Student(str(tmp_path / "theirs")).tokenizer()
    tokenizer.chat_template = CHAT.replace("[assistant]", "=")
    tokenizer.save_pretrained(tmp_path / "theirs")
    foreign = f'{{"class_path": "CrossTokenizerTeacher", "init_args": {{"path": "{tmp_path / "theirs"}"}}}}'
    out = shown(capsys, "--model.student.path", ours, "--model.teacher", foreign, "--data.template", "ChatTemplate",
                "--model.objective.support", "MatchedVocab")  # fmt: skip
    assert "two tokenizers: 94 tokens are in both vocabularies, 6 in the student's alone" in out
    assert "template: the student's completion begins behind" in out


def test_where_the_completion_begins() -> None:
    assert prompt_differences("user: b\nassistant:", "rule\nuser: b\nassistant:", "\nassistant:") == []
    assert prompt_differences("1+1=", "1+1=\nHint: 2", "") == []
    assert "template" in prompt_differences("a\nassistant:", "a\nAssistant:", "\nassistant:")[0]
    assert columns("x\ny", "x\nz\ny", 25)[2:] == ["x\\n            x\\n", "            +  z\\n", "y              y"]
