"""What the report's viewer and heat maps are made of: token records and the map of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import AgreementMonitor, OPDCheckpoint, PositionMap, RolloutRefresh, TokenRecords
from opd_lightning.callbacks.series import read
from opd_lightning.callbacks.token_records import records, watch
from opd_lightning.models.distributions import laws_of
from opd_lightning.objectives import ForwardKL, Objective, ReturnToGo, ReverseKL, SampledToken, Term, Terms, TopK, WrittenToken
from opd_lightning.ops import fused
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import TeacherSource
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

Pair = tuple[Path, Path]
OBJECTIVES: dict[str, Any] = {
    "full": lambda: Objective(ReverseKL()),
    "top-k": lambda: Objective(ReverseKL(), TopK(3)),
    "sampled": lambda: Objective(ReverseKL(), SampledToken(), ReturnToGo()),
    "terms": lambda: Terms([Term(Objective(ReverseKL())), Term(Objective(ReverseKL(), SampledToken()))]),
}


class Kept(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.outputs.append(outputs["output"])


def fit(root: Path, module: Any, *callbacks: Any, steps: int = 4, data: Any = None, ckpt: str | None = None, **kw: Any) -> None:
    refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), seed=5, **kw)
    run = tiny_trainer(root, [AgreementMonitor(k=4), *callbacks, refresh], max_steps=steps)
    run.fit(module, data or tiny_data(), ckpt_path=ckpt)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_records_hold_what_both_models_think(name: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is recomputed here in float64 from the two models, before the first update."""
    monkeypatch.setattr(fused, "BLOCK", 64)  # several tiles
    module, reference, kept = tiny_module(pair, OBJECTIVES[name]()), tiny_module(pair), Kept()
    reference.configure_model()
    fit(tmp_path, module, TokenRecords(looks=2, rows=2, k=3, tokens=5), kept, data=tiny_data(micro_batch_size=4), steps=3)
    lines = read(tmp_path / "tokens.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 3, 3]
    assert module.watch is None
    first = lines[:2]
    for line, batch in zip(first, kept.batches[:2], strict=True):  # one rollout of either micro-batch
        b = batch.row.tolist().index(line["row"])
        assert line["prompt_index"] == int(batch.prompt_index[b]) and line["ended"] == bool(batch.ended[b])
        ids = batch.completion(b)
        assert line["ids"] == ids[:5] and line["length"] == len(ids)
        text = batch.text.select(torch.tensor([b]))
        with torch.no_grad():
            vocab = reference.vocabulary.size
            p, q = (
                laws_of(m, text, vocab).logits(0, 99).double().log_softmax(-1)[:5]
                for m in (reference.student, reference.teacher.model)
            )
        for who, law in (("student", p), ("teacher", q)):
            top = law.topk(3, -1)
            assert line[f"{who}_top"] == top.indices.tolist()
            assert torch.allclose(torch.tensor(line[f"{who}_top_probs"]).double(), top.values.exp(), rtol=6e-3)
            drawn = law.gather(-1, torch.tensor(line["ids"])[:, None]).squeeze(-1)
            key = "logprob" if who == "student" else "teacher_logprob"
            assert torch.allclose(torch.tensor(line[key]).double(), drawn, rtol=1e-3, atol=1e-4)
            entropy = -(law.exp() * law).sum(-1)
            assert torch.allclose(torch.tensor(line[f"{who}_entropy"]).double(), entropy, rtol=1e-3)
        assert torch.allclose(torch.tensor(line["reverse_kl"]).double(), (p.exp() * (p - q)).sum(-1), rtol=2e-3, atol=1e-6)
        assert torch.allclose(torch.tensor(line["sampler_logprob"]), torch.tensor(line["logprob"]), atol=1e-3)  # on-policy
        assert ("advantage" in line) == (name == "sampled")
        if name == "sampled":  # minus what is still to come
            whole = batch.text.select(torch.tensor([b]))
            models = (reference.student, reference.teacher.model)
            laws = [laws_of(m, whole, vocab).logits(0, 99).double().log_softmax(-1) for m in models]
            ours, theirs = (law.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1) for law in laws)
            togo = -(ours - theirs).flip(0).cumsum(0).flip(0)
            assert torch.allclose(torch.tensor(line["advantage"]).double(), togo[:5].detach(), rtol=5e-3, atol=1e-3)
        vocabulary = reference.vocabulary
        assert all(line["pieces"][str(i)] == vocabulary.piece(i) for i in line["ids"])


def test_recording_changes_nothing_that_is_trained(pair: Pair, tmp_path: Path) -> None:
    on, off = tiny_module(pair), tiny_module(pair)
    fit(tmp_path / "on", on, TokenRecords(looks=4))
    fit(tmp_path / "off", off, TokenRecords(looks=0))
    assert same(weights(on), weights(off))
    assert (tmp_path / "on/tokens.jsonl").exists() and not (tmp_path / "off/tokens.jsonl").exists()


def test_text_alone_has_no_teacher_in_it(pair: Pair, tmp_path: Path) -> None:
    module = tiny_module(pair, Objective(ForwardKL(), WrittenToken()))
    fit(tmp_path, module, TokenRecords(looks=1, rows=1), source=TeacherSource(), steps=1)
    (line,) = read(tmp_path / "tokens.jsonl")
    assert line["writer"] == "other" and "teacher_top" not in line and "reverse_kl" not in line
    assert len(line["student_top"]) == len(line["ids"]) == len(line["loss"])


def test_a_resumed_run_leaves_the_same_files(pair: Pair, tmp_path: Path) -> None:
    """Interrupted inside a line of the map (two steps each), with lines written after the checkpoint, the last one cut."""
    parts = lambda: (TokenRecords(looks=6, rows=1), PositionMap(bins=4, lines=3), OPDCheckpoint(every_n_steps=3))  # noqa: E731
    fit(tmp_path / "whole", tiny_module(pair), *parts(), steps=6)
    fit(tmp_path / "cut", tiny_module(pair), *parts(), steps=6)
    for name in ("tokens.jsonl", "positions.jsonl"):
        file = tmp_path / "cut" / name
        file.write_text(file.read_text()[:-20])
    ckpt = tmp_path / "cut/checkpoints/step-000003.ckpt"
    fit(tmp_path / "cut", tiny_module(pair), *parts(), steps=6, ckpt=str(ckpt))
    for name in ("tokens.jsonl", "positions.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert [line["step"] for line in read(tmp_path / "whole/positions.jsonl")] == [2, 4, 6]


def test_the_map_is_the_mean_of_the_tokens(pair: Pair, tmp_path: Path) -> None:
    kept = Kept()
    fit(tmp_path, tiny_module(pair), PositionMap(bins=3, lines=2), kept, data=tiny_data(micro_batch_size=4))
    lines = read(tmp_path / "positions.jsonl")
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["width"] == 3
    stats = [output.stats for output in kept.outputs[:4]]  # two micro-batches a step
    place = torch.cat([s.position for s in stats]) // 3
    for name in ("student_entropy", "teacher_entropy", "reverse_kl", "overlap"):
        values = torch.cat([s.values[name] for s in stats]).double()
        expected = [float(values[place == b].mean()) if (place == b).any() else None for b in range(3)]
        assert lines[0][name] == pytest.approx(expected, rel=1e-3)
    assert lines[0]["count"] == [int((place == b).sum()) for b in range(3)]


def test_records_stay_small(pair: Pair, tmp_path: Path) -> None:
    """At the defaults: 20 looks, 3 rollouts, 256 tokens, top-5, whatever the length of the run."""
    module = tiny_module(pair)
    fit(tmp_path, module, TokenRecords(looks=1, rows=1, k=5), steps=1)
    (line,) = read(tmp_path / "tokens.jsonl")
    a_token = len(json.dumps(line, separators=(",", ":"))) / len(line["ids"])  # what every line has is counted with it
    assert 20 * 3 * 256 * a_token < 10e6
    assert sum(TokenRecords().is_due(step, 100_000) for step in range(1, 100_001)) == 20
    with pytest.raises(ValueError, match="rows=0"):
        TokenRecords(rows=0)
    with pytest.raises(ValueError, match="bins=0"):
        PositionMap(bins=0)


def test_a_row_without_tokens_is_left_out(pair: Pair) -> None:
    module = tiny_module(pair)
    module.configure_model()
    data = tiny_data()
    data.vocabulary = module.vocabulary
    data.setup("fit")
    sampler = NativeSampler(max_new_tokens=4)
    prompts = [data.prompt_at(i) for i in range(3)]
    rollout = module.join(prompts, module.write(prompts, "student", sampler, [1, 2, 3]))
    rollout = rollout.without(torch.tensor([False, True, False]))
    module.watch = watch(rollout, [0, 1, 2], 2)
    output = module.score(rollout, module.objective)
    found = records(module.vocabulary, rollout, output, [0, 1, 2], 2)
    assert [line["row"] for line in found] == [rollout.row[0], rollout.row[2]]
    assert all(len(line["ids"]) == len(line["student_top"]) == min(2, line["length"]) for line in found)
    assert found[1]["student_top"] == output.stats.likeliest["student_ids"][-found[1]["length"] :][:2].tolist()
