"""What privileged information a student can take over, and where it stops, against closed forms and a general optimiser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.inspect.floor import Direction, floor, mean_divergence, optimum, train


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_no_law_goes_below_the_floor_and_the_optimum_reaches_it(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(0)
    teachers = (2 * torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    least = floor(teachers, weights, direction)
    best = optimum(teachers, weights, direction)
    torch.testing.assert_close(mean_divergence(best, teachers, weights, direction), least)
    for _ in range(200):
        other = (best + 0.3 * torch.randn(best.shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
        assert (mean_divergence(other, teachers, weights, direction) > least).all()
    logits = torch.zeros_like(best, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def value() -> torch.Tensor:
        search.zero_grad()
        loss = mean_divergence(logits.log_softmax(-1), teachers, weights, direction).sum()
        loss.backward()
        return loss

    search.step(value)
    torch.testing.assert_close(mean_divergence(logits.detach().log_softmax(-1), teachers, weights, direction), least)


def test_the_forward_floor_is_the_mutual_information() -> None:
    """H(Y) + H(I) - H(Y, I), from the joint law."""
    q = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    joint = weights[:, None] * q[0].exp()

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log()).sum()

    expected = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
    torch.testing.assert_close(floor(q, weights, "forward")[0], expected)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_one_rule_is_learned_and_transfers_another_answer_for_every_row_is_not(direction: Direction) -> None:
    rule, answers = train(True, direction, 0, 60), train(False, direction, 0, 60)
    assert abs(rule.floor) < 1e-12 and rule.removed > 0.9
    assert rule.behaviour[1] > 0.9 * rule.behaviour[2] and rule.transfer > 0.8
    assert answers.curve[-1] == pytest.approx(answers.floor, rel=0.02)
    assert answers.behaviour[1] - answers.behaviour[0] < 0.2 * (answers.behaviour[2] - answers.behaviour[0])
    if direction == "reverse":
        assert answers.removed < 0.2


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pi-floor", "--folder", str(tmp_path), "--seeds", "0", "--steps", "5"]) == 0
    out = capsys.readouterr().out
    assert "shared rule: floor 0.00 nat of" in out and ", learnable" in out and "not learnable" in out
    assert len(json.loads((tmp_path / "floor.json").read_text())) == 4
    assert (tmp_path / "floor.png").stat().st_size > 10_000
