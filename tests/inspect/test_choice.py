"""Teachers side by side: ranked by verdict and gain, on the same texts, with those that cannot teach named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_lightning.cli import main
from opd_lightning.models.tiny import save_tiny

SMALL = ["--prompts", "4", "--samples", "2"]


def test_the_one_that_knows_more_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = str(save_tiny(tmp_path / "random", characters="0123456789+=,;&c#", hidden=16, heads=2))
    foreign = str(save_tiny(tmp_path / "foreign", characters="abc", hidden=16, heads=2))
    file = tmp_path / "picked.json"
    names = [foreign, random, "zoo/addition/student", "zoo/addition/teacher"]
    words = ["pick-teacher", "-c", "quickstart.yaml", *SMALL, "--json", str(file), "--teachers", *names]
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found[0]["teacher"] == "zoo/addition/teacher" and found[0]["verdict"]["word"] == "go"
    by_name = {row["teacher"]: row for row in found}
    assert by_name[foreign]["figures"] is None and "different tokenizers" in by_name[foreign]["verdict"]["reasons"][0]
    assert by_name[random]["verdict"]["word"] == "refuse"
    own = by_name["zoo/addition/student"]["figures"]
    assert own["reverse_kl"] == pytest.approx(0.0, abs=1e-4)
    assert own["student"] == by_name["zoo/addition/teacher"]["figures"]["student"]  # the same texts of the student
    assert shown.index("zoo/addition/teacher") < shown.index("zoo/addition/student")


@pytest.mark.parametrize(
    ("names", "says"), [(["zoo/addition/nobody"], "not in the zoo"), (["zoo/addition/teacher"] * 2, "each once")]
)
def test_names_are_checked_before_anything_is_loaded(names: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pick-teacher", "-c", "quickstart.yaml", "--teachers", *names]) == 2
    assert says in capsys.readouterr().err
