"""The floor of a configuration, before it is trained."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.cli import main, read
from opd_lightning.inspect.tellings import estimate

SMALL = ["-c", "methods/opd.yaml", "--data.prompts.size", "40"]


def test_a_shared_rule_has_no_floor_and_answers_of_other_rows_have_one() -> None:
    shared = estimate(read([*SMALL, "--data.teacher_template", "Instruction", "--data.teacher_template.content", "7"]), 4)
    assert not shared.instance and shared.floor == 0.0 and shared.start > 0.01 and shared.learnable
    assert str(shared).startswith(f"shared rule (Instruction): floor 0.00 nat of {shared.start:.2f}, learnable (reverse KL")
    answers = ["--data.teacher_template", "AnswerOnly", "--data.teacher_template.wording", "c{information}{prompt}"]
    told = estimate(read([*SMALL, *answers]), 4, 5, tokens=12)
    assert told.instance and (told.rows, told.tellings) == (4, 5) and told.tokens <= 4 * 12
    assert 0.0 < told.floor < told.start
    forward = estimate(read([*SMALL, *answers, "--model.objective.divergence", "ForwardKL"]), 4, 5, tokens=12)
    assert forward.direction == "forward" and 0.0 < forward.floor < torch.tensor(5.0).log()  # I(Y; I) <= log I
    again = estimate(read([*SMALL, *answers]), 4, 5, tokens=12)
    assert again == told


def test_the_command_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--rows", "2", "--tellings", "2", "--data.teacher_template", "AnswerOnly"]
    assert main(["pi-floor", *words, "--data.teacher_template.wording", "c{information}{prompt}"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("another telling for every row (AnswerOnly): floor ") and "learnable" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "data.teacher_template is null"), (["--data.teacher_template", "SiblingSuccess"], "what the group has written")],
)
def test_where_there_is_no_floor_it_says_so(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(read([*SMALL, *words]))
