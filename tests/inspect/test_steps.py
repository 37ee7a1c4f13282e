"""A run one step at a time: the same run, in a loop that may be left."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning import steps
from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.inspect.steps import Step, walk
from opd_lightning.models.distributions import laws_of
from opd_lightning.objectives import Objective, ReverseKL, SampledToken
from opd_lightning.samplers import NativeSampler
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

Pair = tuple[Path, Path]


def trainer(root: Path, steps: int = 3, **kwargs: Any) -> Any:
    refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), seed=5)
    return tiny_trainer(root, [refresh], max_steps=steps, enable_checkpointing=False, **kwargs)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "opd-fit"]


def test_the_loop_trains_what_fit_trains(pair: Pair, tmp_path: Path) -> None:
    walked, fitted, reference = tiny_module(pair), tiny_module(pair), tiny_module(pair)
    reference.configure_model()
    data = tiny_data(micro_batch_size=4)
    found: list[Step] = []
    for step in walk(trainer(tmp_path / "a"), walked, data):
        if not found:  # before anything has changed, except by this very step
            before = reference
            with torch.no_grad():
                laws = [
                    laws_of(m, step.rollouts.text, before.vocabulary.size).logits(0, 10**4).double().log_softmax(-1)
                    for m in (before.student, before.teacher.model)
                ]
        found.append(step)
    trainer(tmp_path / "b").fit(fitted, tiny_data(micro_batch_size=4))
    assert same(weights(walked), weights(fitted))
    assert [step.number for step in found] == [1, 2, 3] and not threads()
    first = found[0]
    mask = first.rollouts.mask
    assert len(first.rollouts) == 8 and first.advantage.shape == first.loss.shape == mask.shape
    drawn = first.rollouts.text.targets[mask][:, None]
    gap = (laws[1] - laws[0]).gather(-1, drawn).squeeze(-1)
    assert torch.allclose(first.advantage[mask].double(), gap, atol=1e-4) and first.advantage[~mask].isnan().all()
    kl = (laws[0].exp() * (laws[0] - laws[1])).sum(-1)
    assert torch.allclose(first.values("reverse_kl")[mask].double(), kl, rtol=1e-3, atol=1e-6)
    assert torch.allclose(first.loss[mask].double(), kl, rtol=1e-3, atol=1e-6)
    assert first.metrics["train/reverse_kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    with pytest.raises(KeyError, match="there are k1"):
        first.values("courage")


def test_it_shows_tokens_with_what_both_models_prefer(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = next(walk(trainer(tmp_path), tiny_module(pair), tiny_data(), k=3, shown=2))
    assert not threads()  # leaving the loop has ended the fit
    page = step._repr_html_()
    tokens = sum(len(record["ids"]) for record in step.records[:2])
    assert page.count("title=") == page.count("background:rgba") == tokens
    record = step.records[0]
    best = record["pieces"][str(record["teacher_top"][0][0])]
    assert f"teacher: {best!r} {100 * record['teacher_top_probs'][0][0]:.3g} %".replace("'", "&#x27;") in page
    step.show("reverse_kl")  # no notebook here: as text
    shown = capsys.readouterr().out
    assert shown.startswith("step 1: 8 rollouts, loss ") and record["prompt"] in shown
    with pytest.raises(ValueError, match="allowed are advantage, reverse_kl"):
        step.show("green")


def test_a_sampled_objective_shows_its_own_advantage(pair: Pair, tmp_path: Path) -> None:
    module = tiny_module(pair, Objective(ReverseKL(), SampledToken()))
    for step in walk(trainer(tmp_path, 1), module, tiny_data()):
        mask = step.rollouts.mask
        assert torch.equal(step.advantage[mask], step.values("advantage")[mask])


def test_errors_come_out_of_the_loop(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=8"):
        list(walk(trainer(tmp_path), tiny_module(pair), tiny_data(micro_batch_size=3)))

    def broken() -> None:
        for _ in walk(trainer(tmp_path), tiny_module(pair), tiny_data()):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        broken()
    assert not threads()


def test_a_refused_configuration_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = list(sys.argv)
    with pytest.raises(ValueError, match="refused"):
        next(steps("quickstart.yaml", {"data.batch_sise": 4}))
    assert sys.argv == words
    assert "batch_size" in capsys.readouterr().err
