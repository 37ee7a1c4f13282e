from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import (
    AgreementMonitor,
    ColdStart,
    CompletionEval,
    CompletionTable,
    EntropyMonitor,
    RolloutRefresh,
    TrainMonitor,
)
from opd_lightning.data import ByDifficulty, JsonlPrompts
from opd_lightning.metrics import RegexMatch
from opd_lightning.metrics.catalog import define
from opd_lightning.models import LoRA
from opd_lightning.models.distributions import laws_of
from opd_lightning.objectives import (
    DegenerateObjective,
    ForwardKL,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    WrittenToken,
)
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import DatasetSource, MixtureSource, StudentSource, TeacherSource
from opd_lightning.types import NOT_A_STUDENT
from tests.helpers import tiny_data, tiny_module, tiny_trainer, weights

SAMPLER = NativeSampler(max_new_tokens=6)


class Seen(pl.Callback):
    """What reaches the training step, and what is logged at its end."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.steps: list[int] = []
        self.outputs: list[Any] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(root: Path, pair: tuple[Path, Path], *callbacks: Any, module: Any = None, data: Any = None, **trainer: Any) -> Any:
    seen = Seen()
    run = tiny_trainer(root, [*callbacks, TrainMonitor(), seen], enable_checkpointing=False, **trainer)
    run.fit(module or tiny_module(pair), data or tiny_data())
    return run, seen


# ---- rollouts ---------------------------------------------------------------------------------------------------------------


def test_rollouts_are_fresh_grouped_and_on_policy(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, seen = fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, rollouts_per_prompt=2, seed=5), max_steps=3)
    for step, batch in enumerate(seen.batches):
        assert batch.policy_step.tolist() == [step] * 8  # written by the student that is trained on them
        assert sorted(batch.row.tolist()) == list(range(8 * step, 8 * step + 8))
        groups = dict(zip(batch.row.tolist(), batch.prompt_index.tolist(), strict=True))
        assert all(groups[r] == groups[r + 1] for r in groups if r % 2 == 0)
    assert all(m["train/staleness"] == 0.0 for m in seen.logged)
    assert all(m["train/ratio_deviation"] < 1e-5 for m in seen.logged)
    lengths = torch.tensor([int(batch.mask.sum()) for batch in seen.batches])
    assert [m["rollout/total_tokens"] for m in seen.logged] == lengths.cumsum(0).tolist()


def test_reuse_shows_as_staleness(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, seen = fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, every_n_steps=4, passes=2, seed=5), max_steps=4)
    assert [m["train/staleness"] for m in seen.logged] == [0.0, 1.0, 2.0, 3.0]
    rows = [set(b.row.tolist()) for b in seen.batches]
    assert rows[0] | rows[1] == rows[2] | rows[3]


def test_the_logged_loss_is_the_reverse_kl_of_the_rollouts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Recomputed here from the two models, before the first update."""
    module = tiny_module(pair)
    reference = tiny_module(pair)
    reference.configure_model()
    _, seen = fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, seed=5), module=module, max_steps=1)
    batch = seen.batches[0]
    with torch.no_grad():
        ours = laws_of(reference.student, batch.text, reference.vocabulary.size).logits(0, 10**6).double().log_softmax(-1)
        theirs = (
            laws_of(reference.teacher.model, batch.text, reference.vocabulary.size).logits(0, 10**6).double().log_softmax(-1)
        )
    expected = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert seen.logged[0]["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert seen.logged[0]["train/reverse_kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("rollout", "data", "trainer", "message"),
    [
        ({"rollouts_per_prompt": 3}, {}, {}, "rollouts_per_prompt=3 must divide data.batch_size=8"),
        ({}, {"micro_batch_size": 3}, {}, "data.micro_batch_size=3 must divide"),
        ({}, {}, {"accumulate_grad_batches": 3}, "leave it out, it is derived"),
        ({}, {}, {"max_epochs": 2}, "set trainer.max_steps"),
        ({}, {"held_out": 40}, {}, "only 40 rows"),
        ({}, {}, {"precision": "bf16-true"}, "rounds rotary tables"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(
    rollout: dict, data: dict, trainer: dict, message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, seed=5, **rollout), data=tiny_data(**data), **trainer)


@pytest.mark.parametrize(
    ("objective", "source", "extra", "message"),
    [
        (Objective(ForwardKL(), WrittenToken()), StudentSource(), {}, "imitates itself"),
        (Objective(ReverseKL(), credit=ReturnToGo()), MixtureSource(StudentSource(), TeacherSource()), {}, "did not write"),
        (Objective(ReverseKL(), credit=ReturnToGo()), StudentSource(), {"every_n_steps": 2}, "serves 2 optimizer steps"),
    ],
)
def test_sources_that_do_not_fit_the_objective_are_refused_before_any_weight_is_loaded(
    objective: Objective, source: Any, extra: dict, message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    module = tiny_module(pair, objective)
    with pytest.raises(DegenerateObjective, match=message):
        fit(tmp_path, pair, RolloutRefresh(source, SAMPLER, seed=5, **extra), module=module)
    assert module.student is None


def test_sampling_another_law_than_the_scored_one_warns(pair: tuple[Path, Path], tmp_path: Path) -> None:
    hot = NativeSampler(max_new_tokens=6, temperature=1.5)
    with pytest.warns(UserWarning, match="not the student's own"):
        fit(tmp_path, pair, RolloutRefresh(sampler=hot, seed=5), max_steps=1)


def test_sources(pair: tuple[Path, Path], tmp_path: Path) -> None:
    written = Objective(ForwardKL(), WrittenToken())
    _, seen = fit(
        tmp_path, pair, RolloutRefresh(TeacherSource(), SAMPLER, seed=5), module=tiny_module(pair, written), max_steps=1
    )
    assert set(seen.batches[0].policy_step.tolist()) == {NOT_A_STUDENT}
    assert not seen.batches[0].sampler_logprobs.isnan().any()
    _, seen = fit(
        tmp_path, pair, RolloutRefresh(DatasetSource(), SAMPLER, seed=5), module=tiny_module(pair, written), max_steps=1
    )
    batch = seen.batches[0]
    assert batch.sampler_logprobs[batch.mask].isnan().all()
    data = tiny_data()
    module = tiny_module(pair)
    data.vocabulary = module.vocabulary
    data.setup("fit")
    prompt = data.train_prompts[0]
    assert module.vocabulary.decode(prompt.reference) == prompt.fields["completion"]
    assert prompt.reference[-1] in module.vocabulary.eos_ids


def test_a_sampled_token_refuses_text_of_an_unknown_sampler(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module = tiny_module(pair, Objective(ReverseKL(), SampledToken()))
    with pytest.raises(ValueError, match="completions from a data set"):
        fit(tmp_path, pair, RolloutRefresh(DatasetSource(), SAMPLER, seed=5), module=module)


def test_the_mixture_has_the_promised_share(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = MixtureSource(StudentSource(), DatasetSource(), fraction=0.25)
    _, seen = fit(tmp_path, pair, RolloutRefresh(source, SAMPLER, seed=5), max_steps=2)
    assert [(b.policy_step >= 0).sum().item() for b in seen.batches] == [2, 2]


# ---- cold start -------------------------------------------------------------------------------------------------------------


def test_cold_start_lends_source_and_objective_and_hands_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cold = ColdStart(steps=2, reset_optimizer=True)
    run, seen = fit(tmp_path, pair, cold, RolloutRefresh(sampler=SAMPLER, seed=5), max_steps=4)
    assert [bool((b.policy_step >= 0).all()) for b in seen.batches] == [False, False, True, True]
    assert ["teacher_entropy" in o.stats.values for o in seen.outputs] == [False, False, True, True]
    steps = {int(s["step"]) for s in run.optimizers[0].state.values()}
    assert steps == {2}  # the moments began anew at the border


def test_a_cold_start_inside_a_refresh_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multiple of rollout\.every_n_steps=2"):
        fit(tmp_path, pair, ColdStart(steps=3), RolloutRefresh(sampler=SAMPLER, every_n_steps=2, seed=5))


# ---- monitors ---------------------------------------------------------------------------------------------------------------


def test_monitors_log_token_means_of_the_whole_optimizer_step(pair: tuple[Path, Path], tmp_path: Path) -> None:
    monitors = [EntropyMonitor(edges=[1, 3]), AgreementMonitor(k=4)]
    rollout = RolloutRefresh(sampler=SAMPLER, seed=5)
    _, seen = fit(tmp_path, pair, *monitors, rollout, data=tiny_data(micro_batch_size=2), max_steps=1)
    assert len(seen.outputs) == 4
    last = seen.logged[-1]
    for key in ("student_entropy", "teacher_entropy", "overlap", "student_overlap_mass", "overlap_advantage"):
        values = torch.cat([o.stats.values[key] for o in seen.outputs])
        assert last[f"train/{key}"] == pytest.approx(values.mean().item(), rel=1e-4)
    position = torch.cat([o.stats.position for o in seen.outputs])
    entropy = torch.cat([o.stats.values["student_entropy"] for o in seen.outputs])
    assert last["train/student_entropy/1-2"] == pytest.approx(
        entropy[(position == 1) | (position == 2)].mean().item(), rel=1e-4
    )
    assert "train/teacher_entropy/3-" in last
    assert all(define(key) for key in last), [key for key in last if not define(key)]


def test_signal_and_sample_size_by_hand_however_the_step_is_cut_up(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Stale rollouts, so that the importance ratio is not 1; recomputed from the tokens of all micro-batches."""
    rollout = RolloutRefresh(sampler=SAMPLER, every_n_steps=2, passes=2, seed=5)
    _, seen = fit(tmp_path, pair, rollout, data=tiny_data(micro_batch_size=2), max_steps=2)
    outputs, last = seen.outputs[4:], seen.logged[-1]
    cost, ratio = (torch.cat([o.stats.values[key] for o in outputs]).double() for key in ("k1", "ratio"))
    assert (ratio - 1.0).abs().max() > 0.01
    expected = {
        "train/neg_frac": (cost > 0).double().mean(),
        "train/suppressed": cost.clamp(min=0).mean(),
        "train/raised": -cost.clamp(max=0).mean(),
        "train/effective_sample": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
    for key, value in expected.items():
        assert last[key] == pytest.approx(value.item(), rel=1e-4), key
    assert last["train/suppressed"] - last["train/raised"] == pytest.approx(last["train/k1"], rel=1e-4)


def test_repetition_and_distinct_by_hand(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, seen = fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, seed=5), data=tiny_data(micro_batch_size=2), max_steps=1)
    texts = [batch.completion(b) for batch in seen.batches for b in range(len(batch))]
    grams = [[tuple(t[i : i + 3]) for i in range(len(t) - 2)] for t in texts]
    everything = [g for row in grams for g in row]
    assert seen.logged[-1]["rollout/distinct"] == pytest.approx(len(set(everything)) / len(everything))
    repeated = [1 - len(set(row)) / len(row) for row in grams if row]
    assert seen.logged[-1]["rollout/repetition"] == pytest.approx(sum(repeated) / len(repeated))


def test_the_completion_table_is_written_where_people_look(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fit(tmp_path, pair, CompletionTable(every_n_steps=2, rows=2), RolloutRefresh(sampler=SAMPLER, seed=5), max_steps=4)
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 1, 2, 2, 4, 4]
    for r in records:
        assert r["reverse_kl"] > 0.0
        assert "+" in r["prompt"] and r["writer"] == "student"


# ---- evaluation -------------------------------------------------------------------------------------------------------------


def test_evaluation_before_between_and_after(pair: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = CompletionEval(
        every_n_steps=2, sampler=SAMPLER, grader=RegexMatch(r"\d"), samples_per_prompt=3, pass_at=[1, 3]
    )
    run, _ = fit(tmp_path, pair, evaluation, RolloutRefresh(sampler=SAMPLER, seed=5), max_steps=5)
    assert [(r["who"], r["step"]) for r in evaluation.history] == [
        ("teacher", 0),
        ("student", 0),
        ("student", 2),
        ("student", 4),
        ("student", 5),
    ]
    for row in evaluation.history:
        records = [json.loads(x) for x in (tmp_path / "eval" / f"{row['who']}-{row['step']:06d}.jsonl").open()]
        assert len(records) == 24
        assert row["accuracy"] == pytest.approx(sum(r["score"] for r in records) / 24)
        assert row["accuracy"] == pytest.approx(row["pass@1"])
        assert row["pass@3"] >= row["pass@1"]
    assert json.loads((tmp_path / "eval" / "history.json").read_text()) == evaluation.history
    assert evaluation.history[0]["reverse_kl"] == 0.0
    assert evaluation.history[-1]["reverse_kl"] < evaluation.history[1]["reverse_kl"]
    assert run.callback_metrics["eval/accuracy"] == pytest.approx(evaluation.history[-1]["accuracy"])


def test_held_out_reverse_kl_by_hand(pair: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = CompletionEval(every_n_steps=0, sampler=SAMPLER, seed=5)
    module = tiny_module(pair)
    seen = []
    original = module.score
    module.score = lambda rollout, *a, **k: seen.append(rollout) or original(rollout, *a, **k)
    fit(tmp_path, pair, evaluation, RolloutRefresh(sampler=SAMPLER, seed=5), module=module, max_steps=1)
    reference = tiny_module(pair)
    reference.configure_model()
    with torch.no_grad():
        ours = laws_of(reference.student, seen[0].text, reference.vocabulary.size).logits(0, 10**6).double().log_softmax(-1)
        theirs = (
            laws_of(reference.teacher.model, seen[0].text, reference.vocabulary.size).logits(0, 10**6).double().log_softmax(-1)
        )
    expected = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert evaluation.history[1]["reverse_kl"] == pytest.approx(expected, rel=1e-4)


def test_neutral_text_is_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "neutral.jsonl"
    texts = ["1+2=3", "0123456789"]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    evaluation = CompletionEval(every_n_steps=0, sampler=SAMPLER, neutral_text=str(file))
    module = tiny_module(pair)
    fit(tmp_path, pair, evaluation, RolloutRefresh(sampler=SAMPLER, seed=5), module=module, max_steps=1)
    reference = tiny_module(pair)
    reference.configure_model()
    nll = []
    for text in texts:
        ids = torch.tensor([reference.vocabulary.tokenizer(text, add_special_tokens=False).input_ids])
        logits = reference.student.eval()(input_ids=ids).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    assert evaluation.history[1]["neutral_nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert "neutral_nll" not in evaluation.history[0]


def test_pass_at_k_beyond_the_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="samples_per_prompt=2"):
        CompletionEval(samples_per_prompt=2, pass_at=[1, 4])


def test_early_stopping_and_best_checkpoints_see_the_measurements(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    best = ModelCheckpoint(tmp_path / "best", monitor="eval/reverse_kl", mode="min", filename="{step}")
    stop = EarlyStopping("eval/reverse_kl", mode="min", patience=1, min_delta=99.0)
    evaluation = CompletionEval(every_n_steps=1, sampler=SAMPLER)
    rollout = RolloutRefresh(sampler=SAMPLER, seed=5)
    run = tiny_trainer(tmp_path, [best, stop, evaluation, rollout], max_steps=9)
    run.fit(tiny_module(pair), tiny_data())
    assert run.global_step == 2
    assert Path(best.best_model_path).is_file()


def test_the_probe_orders_prompts_by_difficulty(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tiny_data(selector=ByDifficulty(samples=2), prompts=tiny_data().prompt_set)
    fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, seed=5), data=data, max_steps=1)
    assert len(data.scores) == len(data.train_prompts) == 32
    ungraded = tmp_path / "p.jsonl"
    ungraded.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(16)))
    data = tiny_data(selector=ByDifficulty(), prompts=JsonlPrompts(str(ungraded)), held_out=0)
    with pytest.raises(ValueError, match="needs a prompt set with a grader"):
        fit(tmp_path, pair, RolloutRefresh(sampler=SAMPLER, seed=5), data=data)


def test_two_fits_in_a_row_go_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module, data = tiny_module(pair, lora=LoRA(r=2)), tiny_data()
    rollout = RolloutRefresh(sampler=SAMPLER, seed=5)
    tiny_trainer(tmp_path, [rollout], max_steps=2).fit(module, data)
    first = weights(module)
    tiny_trainer(tmp_path, [rollout], max_steps=2).fit(module, data)
    assert any(not torch.equal(first[n], w) for n, w in weights(module).items())
