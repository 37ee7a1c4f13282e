from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_lightning.data import (
    Addition,
    ByDifficulty,
    ByLength,
    ChatTemplate,
    JsonlPrompts,
    PlainTemplate,
    PromptDataModule,
    Shuffled,
    TaskPrompts,
)
from opd_lightning.data.prompts import BadRows, DatasetPrompts, GivenPrompts, ReasoningGymPrompts
from opd_lightning.models.tiny import character_tokenizer
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.types import Prompt


def write(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def test_rows_come_back_with_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"q": "a?", "gold": "b", "level": 3}', "", '{"q": [{"role": "user", "content": "x"}]}')
    rows = JsonlPrompts(path, prompt_key="q", completion_key="gold").rows()
    assert [r["prompt"] for r in rows] == ["a?", [{"role": "user", "content": "x"}]]
    assert rows[0]["completion"] == "b" and rows[0]["level"] == 3 and "completion" not in rows[1]


BAD = [
    '{"prompt": "ok"}',
    '{"prompt": ""}',
    "{broken",
    b'{"prompt": "\xff"}',
    '{"question": "no prompt"}',
    '["list"]',
    '{"prompt": 3}',
]


def test_bad_rows_are_named_with_file_and_line_and_stop_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *BAD)
    with pytest.raises(BadRows) as caught:
        JsonlPrompts(path).rows()
    message = str(caught.value)
    assert "6 of 7 rows cannot be used" in message
    for line in (2, 3, 4, 5, 6):
        assert f"bad.jsonl:{line}:" in message
    assert "... and 1 more" in message and "on_bad_row: skip" in message
    assert "'prompt' is empty" in message and "no column 'prompt'; columns: question" in message


def test_or_they_are_skipped_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *BAD)
    with pytest.warns(UserWarning, match="6 of 7 rows"):
        rows = JsonlPrompts(path, on_bad_row="skip").rows()
    assert [r["prompt"] for r in rows] == ["ok"]


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        JsonlPrompts(str(tmp_path / "none.jsonl")).rows()
    with pytest.raises(BadRows, match="no rows"):
        JsonlPrompts(write(tmp_path / "empty.jsonl", "")).rows()


def test_a_local_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", *[json.dumps({"question": f"q{i}", "answer": i}) for i in range(3)])
    rows = DatasetPrompts(str(folder), prompt_key="question").rows()
    assert [(r["prompt"], r["answer"]) for r in rows] == [("q0", 0), ("q1", 1), ("q2", 2)]


def test_reasoning_gym_rows_are_graded_by_its_own_rules() -> None:
    prompts = ReasoningGymPrompts("chain_sum", size=5, seed=1)
    rows, grade = prompts.rows(), prompts.grader()
    assert len(rows) == 5 and rows == ReasoningGymPrompts("chain_sum", size=5, seed=1).rows()
    assert grade(rows[0], f" {rows[0]['answer']} ") == 1.0
    assert grade(rows[0], "definitely wrong") < 1.0
    with pytest.raises(ValueError, match=r"near: .*chain_sum"):
        ReasoningGymPrompts("chain_sums").rows()


def test_task_rows_are_different_repeatable_and_right() -> None:
    task = Addition(digits=2)
    rows = TaskPrompts(task, size=200, seed=4).rows()
    assert len({r["prompt"] for r in rows}) == 200
    assert rows == TaskPrompts(task, size=200, seed=4).rows() != TaskPrompts(task, size=200, seed=5).rows()
    assert all(task(r, r["completion"]) == 1.0 for r in rows)
    with pytest.raises(ValueError, match="fewer than"):
        TaskPrompts(Addition(digits=1), size=101).rows()


# ---- templates --------------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_plain_template() -> None:
    tokenizer = character_tokenizer("ab:")
    template = PlainTemplate(prefix="a", suffix=":")
    assert template.text({"prompt": "b"}, tokenizer) == "<bos>ab:"
    assert template.ids([{"prompt": "b"}], tokenizer) == [(1, 4, 5, 6)]
    with pytest.raises(ValueError, match="ChatTemplate"):
        template.ids([{"prompt": [{"role": "user", "content": "x"}]}], tokenizer)


def test_chat_template_with_system_and_demonstrations() -> None:
    tokenizer = character_tokenizer("abc")
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate().text({"prompt": "a"}, tokenizer)
    tokenizer.chat_template = CHAT
    template = ChatTemplate(system="s", shots=[["u", "v"]])
    assert template.text({"prompt": "a"}, tokenizer) == "<system>s<user>u<assistant>v<user>a<assistant>"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    assert ChatTemplate().text({"prompt": messages}, tokenizer) == "<user>x<assistant>y<user>z<assistant>"
    with pytest.raises(ValueError, match="pair"):
        ChatTemplate(shots=[["only user"]])


# ---- selectors --------------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt(index=i, text="", ids=(1,) * n) for i, n in enumerate([3, 1, 2, 3, 1])]


def test_shuffled_is_a_function_of_seed_and_pass() -> None:
    orders = [Shuffled().order(PROMPTS, None, epoch, seed=0) for epoch in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(o) for o in orders}) > 1
    assert orders == [Shuffled().order(PROMPTS, None, epoch, seed=0) for epoch in range(4)]


def test_by_length() -> None:
    lengths = [len(PROMPTS[i].ids) for i in ByLength().order(PROMPTS, None, 0, 0)]
    assert lengths == [1, 1, 2, 3, 3]
    assert [len(PROMPTS[i].ids) for i in ByLength(descending=True).order(PROMPTS, None, 0, 0)] == lengths[::-1]


def test_by_difficulty_keeps_what_is_neither_too_easy_nor_too_hard() -> None:
    scores = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ByDifficulty(0.2, 0.8).order(PROMPTS, scores, 0, 0) == [3, 2, 1]
    assert ByDifficulty().probe_samples == 4
    with pytest.raises(ValueError, match=r"probe found 0\.00 to 1\.00"):
        ByDifficulty(0.3, 0.4).order(PROMPTS, scores, 0, 0)
    with pytest.raises(ValueError, match="low <= high"):
        ByDifficulty(0.9, 0.1)


def test_text_that_the_tokenizer_does_not_know_is_reported() -> None:
    tokenizer = character_tokenizer("0123456789+=")
    data = PromptDataModule(GivenPrompts(["1+2=", "1-2="]), selector=Shuffled())
    data.vocabulary = Vocabulary.of(tokenizer)
    with pytest.warns(UserWarning, match="1 of 2 prompts or completions hold text that the tokenizer does not know"):
        data.setup("fit")
