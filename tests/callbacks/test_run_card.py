from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import (
    AgreementMonitor,
    Alarms,
    CompletionEval,
    EntropyCollapse,
    OPDCheckpoint,
    RolloutRefresh,
    RunCard,
    run_card,
)
from opd_lightning.callbacks.fingerprints import of_weights
from opd_lightning.data import JsonlPrompts
from opd_lightning.inspect.report import Report
from opd_lightning.objectives import ConstantNegative, Objective, ReverseKL, SampledToken
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer

Pair = tuple[Path, Path]
SAMPLER = NativeSampler(max_new_tokens=6)
ITEMS = [
    *("identities", "state source", "state compatibility", "feedback", "support", "realization", "temporal credit", "routing"),
    *("gates and weights", "shaping", "outcome coupling", "regularization", "reduction", "optimization", "off-policyness"),
    *("stability", "budget", "outcome", "controls", "evidence", "data"),
]


def fit(
    root: Path, module: Any, *callbacks: Any, data: Any = None, steps: int = 4, ckpt: str | None = None, **kwargs: Any
) -> Any:
    refresh = RolloutRefresh(sampler=SAMPLER, seed=5)
    run = tiny_trainer(root, [*callbacks, refresh], max_steps=steps, **kwargs)
    run.fit(module, data or tiny_data(), ckpt_path=ckpt)
    return run


def items(root: Path) -> dict[str, Any]:
    return json.loads((root / "run_card.json").read_text())["items"]


def test_the_card_holds_the_21_items_with_what_the_run_knows(pair: Pair, tmp_path: Path) -> None:
    module = tiny_module(pair)
    before = tiny_module(pair)
    before.configure_model()
    evaluation = CompletionEval(every_n_steps=2, sampler=SAMPLER)
    alarms = Alarms([EntropyCollapse(floor=99.0, patience=2)])
    with pytest.warns(UserWarning, match="alarm entropy_collapse"):
        fit(tmp_path, module, evaluation, alarms, AgreementMonitor(k=4), RunCard(evidence="E4: reproduced here"))
    card = items(tmp_path)
    assert list(card) == ITEMS
    assert card["realization"]["declared target"] == module.objective.declared_target.name
    assert card["identities"]["weights at the start"]["student"] == of_weights(before.student) != of_weights(module.student)
    assert card["identities"]["weights at the start"]["teacher"] == of_weights(module.teacher.model)
    assert card["identities"]["versions"]["torch"] == torch.__version__
    assert card["optimization"]["settings"]["lr"] == 1e-2 and card["optimization"]["steps"] == 4
    assert card["optimization"]["seed of the rollouts"] == 5
    assert [event["alarm"] for event in card["stability"]["alarms"]] == ["entropy_collapse"]
    assert card["outcome"]["student latest"] == evaluation.history[-1]
    assert card["evidence"]["class"] == "E4: reproduced here"
    assert card["budget"]["completion tokens written"] > 0
    assert card["state compatibility"]["overlap"]["first"] != card["state compatibility"]["overlap"]["latest"]
    assert json.loads((tmp_path / "run_card.json").read_text())["status"] == "finished"
    text = (tmp_path / "run_card.md").read_text()
    assert all(f"## {n}. {title[0].upper()}{title[1:]}" in text for n, title in enumerate(ITEMS, 1))
    assert module.objective.declared_target.name in text


def test_it_is_written_at_the_start_and_at_every_evaluation(pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[tuple[str, int]] = []
    save = run_card.save
    monkeypatch.setattr(run_card, "save", lambda run, card: (seen.append((card["status"], card["step"])), save(run, card)))
    fit(tmp_path, tiny_module(pair), CompletionEval(every_n_steps=2, sampler=SAMPLER))
    assert seen == [("running", 0), ("running", 2), ("running", 4), ("finished", 4)]


def test_a_run_that_fails_says_so(pair: Pair, tmp_path: Path) -> None:
    class Breaks(RunCard):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("no space left")

    with pytest.raises(RuntimeError):
        fit(tmp_path, tiny_module(pair), Breaks(), enable_checkpointing=False)
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert (card["status"], card["step"]) == ("failed: RuntimeError: no space left", 2)


def test_a_resumed_run_keeps_what_was_true_at_its_start(pair: Pair, tmp_path: Path) -> None:
    fit(tmp_path / "a", tiny_module(pair), OPDCheckpoint(every_n_steps=2, keep=0), steps=4)
    ckpt = str(tmp_path / "a" / "checkpoints" / "step-000002.ckpt")
    fit(tmp_path / "b", tiny_module(pair), steps=4, ckpt=ckpt)
    whole, resumed = items(tmp_path / "a"), items(tmp_path / "b")
    for key in ("identities", "off-policyness", "realization", "data"):
        assert whole[key] == resumed[key], key


def test_data_hashes_tell_prompts_apart_and_find_leaks(pair: Pair, tmp_path: Path) -> None:
    files = {}
    for name, rows in (("train", ["1+1=", "2+2=", "3+3=", "4+4="]), ("held", ["2+2=", "5+5="]), ("other", ["6+6=", "5+5="])):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"prompt": r}) + "\n" for r in rows))
    found = {}
    for name in ("held", "other"):
        prompts, held = (JsonlPrompts(str(files[key])) for key in ("train", name))
        data = tiny_data(prompts=prompts, held_out=0, held_out_prompts=held, batch_size=2)
        fit(tmp_path / name, tiny_module(pair), data=data, steps=1)
        found[name] = items(tmp_path / name)["data"]
    assert [found[name]["held-out prompts that are trained on"] for name in ("held", "other")] == [1, 0]
    assert found["held"]["training prompts, hash"] == found["other"]["training prompts, hash"]
    assert found["held"]["held-out prompts, hash"] != found["other"]["held-out prompts, hash"]


def test_a_control_says_that_it_is_one_and_the_report_shows_the_card(pair: Pair, tmp_path: Path) -> None:
    module = tiny_module(pair, ConstantNegative(ReverseKL(), SampledToken(), allow_degenerate=True))
    run = tmp_path / "run"
    fit(run, module, CompletionEval(every_n_steps=2, sampler=SAMPLER))
    assert items(run)["controls"]["this run is"].startswith("constant negative advantage")
    (run / "controls" / "sft").mkdir(parents=True)
    (run / "controls" / "sft" / "summary.json").write_text("{}")
    Report().show(run)
    assert items(run)["controls"]["run"] == ["sft"]
    page = (run / "report.html").read_text()
    assert "21. data" in page and "constant negative advantage" in page and "finished, step 4" in page
    plain = tmp_path / "plain"
    fit(plain, tiny_module(pair, Objective(ReverseKL())), steps=1)
    assert items(plain)["controls"]["this run is"] == "no control"
