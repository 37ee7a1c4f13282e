"""Choosing prompts: by a probe of both models, at a fixed ratio, without what stands in other sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.data import (
    Addition,
    ByDifficulty,
    DistinctPrompts,
    Interleaved,
    JsonlPrompts,
    MixedPrompts,
    TaskPrompts,
    TeacherAligned,
)
from opd_lightning.data.prompts import GivenPrompts
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Prompt
from tests.helpers import tiny_data, tiny_module, tiny_trainer

PROMPTS = [Prompt(i, "", (1,), fields={"part": int(i >= 6)}) for i in range(10)]
SCORES = [0.9, 0.1, 0.5, 0.7, 0.2, 0.8, 0.3, 0.4, 0.6, 0.0]


def test_the_best_scored_are_kept_in_a_new_order_each_pass() -> None:
    selector = TeacherAligned(keep=0.3)
    passes = [selector.order(PROMPTS, SCORES, epoch, seed=0) for epoch in range(4)]
    assert all(sorted(p) == [0, 3, 5] for p in passes)
    assert len({tuple(p) for p in passes}) > 1
    assert TeacherAligned(keep=0.3, best_first=True).order(PROMPTS, SCORES, 0, 0) == [0, 5, 3]


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_the_ratio_holds_in_every_stretch(share: float) -> None:
    selector = Interleaved([share, 1.0 - share])
    order = selector.order(PROMPTS, None, epoch=0, seed=1)
    parts = [PROMPTS[i].fields["part"] for i in order]
    assert sorted(i for i in order if i < 6) == list(range(6))  # the first part once
    for n in range(1, len(parts) + 1):
        assert abs(parts[:n].count(0) - share * n) <= 1.0
    assert order == selector.order(PROMPTS, None, 0, 1) != selector.order(PROMPTS, None, 1, 1)


def test_a_selector_inside_the_first_part() -> None:
    selector = Interleaved([0.5, 0.5], first=TeacherAligned(keep=0.5, best_first=True))
    order = selector.order(PROMPTS, SCORES, 0, 0)
    assert [i for i in order if i < 6] == [0, 5, 3]
    assert selector.probe_samples == 1 and selector.score == "mass"
    with pytest.raises(ValueError, match="part 2"):
        Interleaved([0.5, 0.25, 0.25]).order(PROMPTS, None, 0, 0)


def test_parts_keep_their_own_graders() -> None:
    easy, hard = (TaskPrompts(Addition(digits=d), size=5, seed=1) for d in (1, 2))
    both = MixedPrompts([easy, hard])
    rows = both.rows()
    assert [row["part"] for row in rows] == [0] * 5 + [1] * 5
    grader = both.grader()
    assert grader is not None and all(grader(row, f"#{row['answer']}") == 1.0 for row in rows)
    assert MixedPrompts([easy, GivenPrompts(["a"])]).grader() is None


def test_prompts_of_other_sets_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.jsonl"
    file.write_text('{"prompt": "What is the capital of France?"}\n{"prompt": "Name three red things in a kitchen."}\n')
    evaluation = JsonlPrompts(str(file))
    given = GivenPrompts(
        [
            "what is the capital of France",
            "Name three red things in a kitchen, please.",
            "How old is the sea?",
            "How old is the sea",
        ]
    )
    assert [r["prompt"] for r in DistinctPrompts(given, [evaluation]).rows()] == [
        "Name three red things in a kitchen, please.",
        "How old is the sea?",
    ]
    assert [r["prompt"] for r in DistinctPrompts(given, [evaluation], similar=0.7).rows()] == ["How old is the sea?"]
    assert len(DistinctPrompts(given, [], itself=False).rows()) == 4
    with pytest.raises(ValueError, match="all 2 prompts"):
        DistinctPrompts(evaluation, [evaluation]).rows()


def probed(pair: tuple[Path, Path], root: Path, selector: Any, ckpt: str | None = None) -> tuple[Any, Any]:
    data, module = tiny_data(selector=selector), tiny_module(pair)
    trainer = tiny_trainer(root, [RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), seed=5)], max_steps=1)
    trainer.fit(module, data, ckpt_path=ckpt)
    return data, trainer


def test_scores_come_from_both_models_and_stay_in_the_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = {}
    for by in ("likelihood", "mass", "headroom"):
        data, trainer = probed(pair, tmp_path, TeacherAligned(by=by, keep=0.25))
        found[by] = data.scores
        assert len(data.scores) == 32 and len(set(data.scores)) > 1
        assert {p.index for p in (data.prompt_at(i) for i in range(8))} <= set(
            sorted(range(32), key=lambda i: -data.scores[i])[:8]
        )
    assert all(x < 0.0 for x in found["likelihood"]) and all(x > 0.0 for x in found["headroom"])
    assert all(0.0 <= x <= 1.0 for x in found["mass"])
    file = tmp_path / "one.ckpt"
    trainer.save_checkpoint(file)
    state = torch.load(file, weights_only=True)
    assert state["PromptDataModule"]["scores"] == found["headroom"]


def test_difficulty_still_asks_the_grader(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = probed(pair, tmp_path, ByDifficulty(samples=2))
    assert set(data.scores) <= {0.0, 0.5, 1.0}
