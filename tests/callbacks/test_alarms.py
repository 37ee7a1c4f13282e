"""Every alarm rings in a real run that has its fault and is silent in real runs that are healthy."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from opd_lightning.callbacks import AgreementMonitor, Alarms, OPDCheckpoint, RolloutRefresh, alarms
from opd_lightning.callbacks.alarms import Alarm, Facts
from opd_lightning.callbacks.step_monitor import logged_at_step
from opd_lightning.data import Addition, Hint, JsonlPrompts, PlainTemplate, PromptDataModule, TaskPrompts
from opd_lightning.metrics.catalog import define
from opd_lightning.models import EMATeacher, FrozenTeacher, FunctionTeacher, LiveTeacher, Student
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ForwardKL, Objective, ReverseKL, SampledToken, TeacherTemperature, TopK
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import TeacherSource
from tests.helpers import tiny_data, tiny_module, tiny_trainer

Pair = tuple[Path, Path]
KINDS = sorted(set(alarms.__all__) - {"Alarm", "Facts"})
EOS = 2  # of the bundled addition models; checked below


class History(pl.Callback):
    """What was logged, step by step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step:
            self._take(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._take(trainer)

    def _take(self, trainer: Any) -> None:
        self.rows.append(logged_at_step(trainer))


def zoo(lr: float = 1e-3, teacher: Any = None, objective: Any = None, **kwargs: Any) -> OPDModule:
    return OPDModule(
        Student("zoo/addition/student"),
        teacher or FrozenTeacher("zoo/addition/teacher"),
        objective or Objective(ReverseKL()),
        optimizer=partial(torch.optim.AdamW, lr=lr),
        **kwargs,
    )


def sums(batch_size: int = 16) -> PromptDataModule:
    return PromptDataModule(TaskPrompts(Addition(), size=2000, split="train"), batch_size=batch_size, seed=5)


def watch(
    root: Path,
    module: OPDModule,
    steps: int,
    data: Any,
    alarm: Alarm | None = None,
    tokens: int = 8,
    actions: dict[str, str] | None = None,
    rollout: dict[str, Any] | None = None,
    extra: list[Any] | None = None,
    **trainer: Any,
) -> tuple[Alarms, History]:
    """A run with all alarms, one of them with thresholds of its own."""
    on_duty, history = Alarms([alarm] if alarm else None, actions), History()
    refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=tokens), seed=5, **(rollout or {}))
    settings = {"max_steps": steps, "gradient_clip_val": 1.0, "enable_checkpointing": bool(extra), **trainer}
    run = tiny_trainer(root, [on_duty, AgreementMonitor(k=4), refresh, history, *(extra or [])], **settings)
    run.fit(module, data)
    return on_duty, history


def never_ends(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = torch.zeros(ids.shape[0], ids.shape[1] - 1, vocab)
    logits[..., EOS] = -12.0
    return logits.log_softmax(-1)


def ends_at_once(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = torch.zeros(ids.shape[0], ids.shape[1] - 1, vocab)
    logits[..., EOS] = 5.0
    return logits.log_softmax(-1)


def one_token(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = torch.zeros(ids.shape[0], ids.shape[1] - 1, vocab)
    logits[..., 7] = 20.0
    return logits.log_softmax(-1)


def far_too_high_from_step_12(step: int) -> float:
    return 20.0 if step >= 12 else 1.0


def a_little_of_one_token(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    return one_token(ids, vocab).mul(0.3).log_softmax(-1)


def recites(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Goes on with what it was told: BOS, the eight tokens, a sign and a prompt of four stand before the completion."""
    position = torch.arange(ids.shape[1] - 1)
    wanted = ids[:, 1 + (position - 13) % 8]
    return (4.0 * torch.nn.functional.one_hot(wanted, vocab)).log_softmax(-1)


def riddles(root: Path) -> PromptDataModule:
    hints = {"1+2=": "##cc&&11", "3+4=": "9,9;9&9c", "5+6=": "07070c7c", "7+8=": "c1c2c3c4"}
    lines = [json.dumps({"prompt": prompt, "hint": hint}) for prompt, hint in hints.items()]
    (root / "riddles.jsonl").write_text("\n".join(lines))
    told = Hint(wording="{information};{prompt}")
    return PromptDataModule(JsonlPrompts(str(root / "riddles.jsonl")), teacher_template=told, batch_size=16, seed=5)


FAULTS: dict[str, Callable[[Path, Pair], Any]] = {
    # a target far sharper than the teacher
    "EntropyCollapse": lambda root, pair: watch(
        root, tiny_module(pair, Objective(ReverseKL(), target=TeacherTemperature(0.05)), lr=3e-2), 30, tiny_data()
    ),
    "MassDrain": lambda root, pair: watch(
        root,
        tiny_module(pair, Objective(ReverseKL(), TopK(4, "student", "raw"), allow_degenerate=True)),
        50,
        tiny_data(),
    ),
    "LengthExplosion": lambda root, pair: watch(root, zoo(1e-3, FunctionTeacher(never_ends)), 20, sums(), tokens=96),
    "EOSLoss": lambda root, pair: watch(root, zoo(1e-3, FunctionTeacher(never_ends)), 20, sums(), tokens=96),
    "LengthCollapse": lambda root, pair: watch(root, zoo(3e-3, FunctionTeacher(ends_at_once)), 15, sums(), tokens=48),
    "PILeak": lambda root, pair: watch(
        root, tiny_module(pair, teacher=FunctionTeacher(recites), lr=2e-2), 80, riddles(root), alarms.PILeak(rise=0.1)
    ),
    "RepetitionLoop": lambda root, pair: watch(root, zoo(3e-3, FunctionTeacher(a_little_of_one_token)), 30, sums(), tokens=32),
    # a learning rate of nearly nothing
    "OverlapStagnation": lambda root, pair: watch(
        root, tiny_module(pair, lr=1e-7), 40, tiny_data(), alarms.OverlapStagnation(steps=20)
    ),
    "GradientSpike": lambda root, pair: watch(
        root, zoo(scheduler=partial(LambdaLR, lr_lambda=far_too_high_from_step_12)), 18, sums(), tokens=48
    ),
    "SignalOutliers": lambda root, pair: watch(root, tiny_module(pair, teacher=FunctionTeacher(one_token)), 8, tiny_data()),
    # eight passes over the same rollouts at a high learning rate
    "StaleRollouts": lambda root, pair: watch(
        root, tiny_module(pair, lr=3e-2), 8, tiny_data(), rollout={"every_n_steps": 8, "passes": 8}
    ),
    # a student that sharpens itself
    "TeacherDrift": lambda root, pair: watch(
        root,
        tiny_module(
            pair, Objective(ReverseKL(), target=TeacherTemperature(0.5), allow_degenerate=True), teacher=LiveTeacher(), lr=1e-2
        ),
        25,
        tiny_data(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_rings_in_a_run_that_has_the_fault(kind: str, pair: Pair, tmp_path: Path) -> None:
    name = getattr(alarms, kind)().name
    with pytest.warns(UserWarning, match=rf"alarm {name} at step \d+: .*Next: "):
        found, history = FAULTS[kind](tmp_path, pair)
    rang = [event for event in found.fired if event["alarm"] == name]
    assert rang and rang[0]["advice"] == getattr(alarms, kind).advice
    assert json.loads((tmp_path / "alarms.json").read_text()) == found.fired
    assert define(f"alarm/{name}")
    if kind == "MassDrain":  # its other symptom: the mass itself, whatever the loss says
        by_mass, facts = alarms.MassDrain(loss=-99.0), Facts(exact=True, teacher_moves=False)
        assert any("of its mass on its top-k" in by_mass.watch(row, facts) for row in history.rows)


HEALTHY: dict[str, Callable[[Path, Pair], tuple[Alarms, History]]] = {
    "distillation": lambda root, pair: watch(root, zoo(), 40, sums(32), tokens=48),
    "far teacher": lambda root, pair: watch(root, tiny_module(pair), 24, tiny_data(), alarms.OverlapStagnation(steps=15)),
    "moving teacher": lambda root, pair: watch(
        root, tiny_module(pair, teacher=EMATeacher(0.05)), 20, tiny_data(teacher_template=PlainTemplate(prefix="12+"))
    ),
    "teacher's text": lambda root, pair: watch(
        root, tiny_module(pair, Objective(ForwardKL()), lr=2e-2), 4, tiny_data(), rollout={"source": TeacherSource()}
    ),
    "sampled and reused": lambda root, pair: watch(
        root,
        zoo(3e-4, objective=Objective(ReverseKL(), SampledToken())),
        24,
        sums(32),
        tokens=48,
        rollout={"every_n_steps": 4, "passes": 2},
    ),
}


@pytest.fixture(scope="module")
def healthy(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Alarms, History]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="alarm .*")
        return {name: run(tmp_path_factory.mktemp("healthy"), pair) for name, run in HEALTHY.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_silent_in_healthy_runs_where_it_looked(kind: str, healthy: dict[str, tuple[Alarms, History]]) -> None:
    looked = 0
    for name, (found, history) in healthy.items():
        assert found.fired == []
        fresh, facts = type(found.alarms[kind])(), Facts(exact=True, teacher_moves=name == "moving teacher")
        looked += sum(fresh.symptom(row, facts) is not None for row in history.rows)
    assert looked > 5  # silence means something: there was something to see


# ---- policy -----------------------------------------------------------------------------------------------------------------


def collapse(root: Path, pair: Pair, action: str, steps: int = 30, **kwargs: Any) -> tuple[Alarms, History]:
    module = tiny_module(pair, Objective(ReverseKL(), target=TeacherTemperature(0.05)), lr=3e-2)
    actions = dict.fromkeys(KINDS, "off") | {"EntropyCollapse": action}
    return watch(root, module, steps, tiny_data(), actions=actions, **kwargs)


def test_stop_ends_the_run_at_that_step(pair: Pair, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="alarm entropy_collapse"):
        found, history = collapse(tmp_path, pair, "stop")
    assert len(history.rows) == found.fired[0]["step"] < 30


@pytest.mark.parametrize("action", ["log", "off"])
def test_log_and_off_say_nothing(action: str, pair: Pair, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="alarm .*")
        found, history = collapse(tmp_path, pair, action)
    assert len(found.fired) == (action == "log") and len(history.rows) == 30
    assert (tmp_path / "alarms.json").is_file() == (action == "log")


def test_checkpoint_keeps_one_and_a_resumed_run_rings_where_the_whole_one_did(pair: Pair, tmp_path: Path) -> None:
    keep = [OPDCheckpoint(every_n_steps=1, keep=0)]
    with pytest.warns(UserWarning, match="alarm entropy_collapse"):
        whole, _ = collapse(tmp_path / "whole", pair, "checkpoint", extra=keep)
    step = whole.fired[0]["step"]
    kept = tmp_path / "whole" / "checkpoints" / f"alarm-entropy_collapse-{step:06d}.ckpt"
    assert torch.load(kept, weights_only=True)["callbacks"]["Alarms"]["fired"] == whole.fired
    module = tiny_module(pair, Objective(ReverseKL(), target=TeacherTemperature(0.05)), lr=3e-2)
    again = Alarms(actions={kind: "off" for kind in KINDS if kind != "EntropyCollapse"} | {"EntropyCollapse": "log"})
    refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), seed=5)
    run = tiny_trainer(tmp_path / "rest", [again, AgreementMonitor(k=4), refresh], max_steps=30, gradient_clip_val=1.0)
    middle = tmp_path / "whole" / "checkpoints" / f"step-{step - 2:06d}.ckpt"  # inside the alarm's patience
    run.fit(module, tiny_data(), ckpt_path=str(middle))
    assert [e["step"] for e in again.fired] == [step]
    assert again.fired[0]["what"] == whole.fired[0]["what"]


def test_unknown_alarms_and_actions_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"alarms\.actions\.EntropyColapse='stop': alarms are .*EntropyCollapse"):
        Alarms(actions={"EntropyColapse": "stop"})
    with pytest.raises(ValueError, match="actions are off, log, warn, checkpoint, stop"):
        Alarms(actions={"EntropyCollapse": "halt"})
    assert Student("zoo/addition/student").tokenizer().eos_token_id == EOS


def test_own_thresholds_replace_the_default_of_their_class(pair: Pair, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"below 99"):
        found, _ = watch(tmp_path, tiny_module(pair), 3, tiny_data(), alarms.EntropyCollapse(floor=99.0, patience=2))
    assert [(e["step"], e["alarm"]) for e in found.fired] == [(2, "entropy_collapse")]  # once, while it lasts


def test_thresholds_and_actions_from_the_command_line() -> None:
    from opd_lightning.cli import ReadingCLI, _built

    own = "[{class_path: EntropyCollapse, init_args: {floor: 0.1}}]"
    words = ["fit", "-c", "quickstart.yaml", "--alarms.actions", "{MassDrain: stop, EOSLoss: 'off'}", "--alarms.alarms", own]
    on_duty = _built(ReadingCLI, words).config_init["fit"]["alarms"]
    assert on_duty.actions == {"MassDrain": "stop", "EOSLoss": "off"}
    assert on_duty.alarms["EntropyCollapse"].floor == 0.1 and "EOSLoss" not in on_duty.alarms
