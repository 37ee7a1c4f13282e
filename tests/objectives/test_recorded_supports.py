"""Top-k supports whose entries were recorded when the text was written: what differs, and only where rollouts are stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import OPDCheckpoint, RolloutRefresh
from opd_lightning.inspect.oracle import TabularWorld
from opd_lightning.models.distributions import laws_of
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Constant, FullVocab, GeneralizedJSD, Objective, ReverseKL, SampledToken, Term, Terms, TopK
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Rollout
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights
from tests.objectives.textbook import close, world

WORLDS = {"fixed": world(6, 2, seed=8), "eos": world(5, 3, seed=9, eos=4)}
each_world = pytest.mark.parametrize("name", WORLDS)


def topk(ids: str, closure: str = "tail", by: str = "student", k: int = 2) -> Objective:
    return Objective(ReverseKL(), TopK(k, by, closure, ids), reduction=Constant(1.0))


# ---- on the oracle -------------------------------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("closure", ["tail", "renormalize", "stop_gradient", "sampled_tail"])
@pytest.mark.parametrize("by", ["student", "union", "intersection"])
def test_on_fresh_rollouts_both_are_the_same(name: str, by: str, closure: str) -> None:
    at = WORLDS[name]
    now, then = (topk(ids, closure, by) for ids in ("scoring", "sampling"))
    close(at.gradients_of(then), at.gradients_of(now), 0.0)
    close(at.moments_of(then).mean, at.declared_gradient(then))


def frozen(at: TabularWorld, entries: torch.Tensor) -> torch.Tensor:
    """Gradient of sum_s d(s) KL of the coarsening with these entries (S, k), on the states of the third law."""
    law, aim, total = at.student.softmax(-1), at.teacher.softmax(-1), torch.zeros((), dtype=torch.float64)
    for s, head in enumerate(entries):
        visits = sum(path.sampler for path in at.paths if s in path.states)
        rest = [v for v in range(at.vocab) if v not in head.tolist()]
        p, q = (torch.cat([x[s][head], x[s][rest].sum()[None]]) for x in (law, aim))
        total = total + visits * (p * (p / q).log()).sum()
    return torch.autograd.grad(total, at.student)[0]


@each_world
def test_on_stale_rollouts_each_follows_its_own_entries(name: str) -> None:
    """The third law is the student that wrote. Its likeliest tokens are others than those of the student that is trained."""
    at = WORLDS[name]
    then, now = (table.detach().topk(2, -1).indices for table in (at.sampler, at.student))
    assert (then.sort(-1).values != now.sort(-1).values).any()
    found = {ids: at.moments_of(topk(ids), "sampler").mean for ids in ("sampling", "scoring")}
    close(found["sampling"], frozen(at, then))
    close(found["scoring"], frozen(at, now))
    assert (found["sampling"] - found["scoring"]).abs().max() > 1e-3
    assert any("who wrote" in bias for bias in topk("sampling").declared_target.biases)
    assert "when it wrote" in str(topk("sampling").declared_target)
    with pytest.raises(ValueError, match="no closed form"):
        at.declared_gradient(topk("sampling"), "sampler")


def test_terms_share_what_is_recorded_and_each_takes_its_own_k() -> None:
    at = WORLDS["eos"]
    parts = [topk("sampling", k=1), topk("sampling", "stop_gradient", k=3), Objective(GeneralizedJSD(), FullVocab())]
    whole = Terms([Term(part) for part in parts])
    assert (whole.record_top_k, parts[2].record_top_k) == (3, 0)
    close(at.gradients_of(whole, "sampler"), sum(at.gradients_of(part, "sampler") for part in parts), 1e-13)


def test_what_is_not_recorded_is_refused() -> None:
    at = WORLDS["eos"]
    with pytest.raises(ValueError, match=r"support\.ids: scoring"):
        at.moments(lambda r, s, t: topk("sampling")(s, t, replace(r, top_ids=None)).loss)
    with pytest.raises(ValueError, match="picks nothing"):
        TopK(2, "teacher", ids="sampling")
    assert SampledToken().record_top_k == 0


# ---- in a run ------------------------------------------------------------------------------------------------------------


class Keep(pl.Callback):
    """Every micro-batch, with the student's likeliest tokens when it is used."""

    def __init__(self) -> None:
        self.seen: list[tuple[Rollout, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Rollout, batch_idx: int) -> None:
        with torch.no_grad():
            laws = laws_of(module.student, batch.text, module.vocabulary.size)
            now = laws.logits(0, len(laws)).topk(3, -1).indices
        self.seen.append((batch, now))


def run(root: Path, pair: tuple[Path, Path], ids: str, micro: int = 8, resume: str | None = None) -> tuple[OPDModule, Keep]:
    pl.seed_everything(3, verbose=False)
    objective = Objective(ReverseKL(), TopK(3, closure="tail", ids=ids))
    module, keep = tiny_module(pair, objective), Keep()
    rollout = RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), every_n_steps=2, seed=5)
    trainer = tiny_trainer(root, [rollout, keep, OPDCheckpoint(every_n_steps=1, keep=0)])
    trainer.fit(module, tiny_data(micro_batch_size=micro), ckpt_path=resume)
    return module, keep


def test_recorded_entries_travel_with_the_rollouts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Right after a refresh they are the student's own; a step later the student has moved on. Resumed and cut up they stay."""
    module, keep = run(tmp_path / "whole", pair, "sampling")
    for step, (batch, now) in enumerate(keep.seen):
        assert batch.top_ids is not None and batch.top_ids.shape == (*batch.mask.shape, 3)
        moved = (batch.top_ids[batch.mask] != now).any(-1).float().mean()
        assert (moved == 0) if step % 2 == 0 else (moved > 0.02), (step, moved)
    for step in (1, 3):  # inside a refresh, with entries of the past
        path = str(tmp_path / f"whole/checkpoints/step-{step:06d}.ckpt")
        again, _ = run(tmp_path / f"from-{step}", pair, "sampling", resume=path)
        assert same(weights(again), weights(module))
    cut, pieces = run(tmp_path / "cut", pair, "sampling", micro=2)
    assert len(pieces.seen) == 4 * len(keep.seen)
    for name, whole in weights(module).items():
        torch.testing.assert_close(weights(cut)[name], whole, rtol=1e-3, atol=2e-5)
    fresh, others = run(tmp_path / "fresh", pair, "scoring")
    assert others.seen[0][0].top_ids is None
    assert not same(weights(fresh), weights(module))
