"""Rollouts by vLLM: the hand-over of weights, the canary, refusals; and runs against a real vLLM (marker ``vllm``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.models import LoRA, ServerTeacher, Student
from opd_lightning.models.lora import base_of, plain_state
from opd_lightning.models.tiny import save_tiny
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.objectives import (
    Discounted,
    NoCorrection,
    Objective,
    ReverseKL,
    SampledToken,
    Term,
    Terms,
    TopK,
    TruncatedRatio,
)
from opd_lightning.objectives.defects import DegenerateObjective
from opd_lightning.samplers import VLLMSampler
from opd_lightning.samplers.drawing import Law
from opd_lightning.samplers.vllm import scores
from opd_lightning.samplers.vllm_server import EngineError, VLLMServer, write_folder
from opd_lightning.types import Completion, Prompt
from tests.helpers import tiny_data, tiny_module, tiny_trainer, weights

URL = "http://127.0.0.1:1"


# ---- without vLLM ------------------------------------------------------------------------------------------------------
def trained_lora(pair: tuple[Path, Path]) -> Any:
    model = Student(str(pair[0]), lora=LoRA(r=4)).build()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def test_a_written_folder_is_the_student_with_its_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, recipe = trained_lora(pair), Student(str(pair[0]))
    base = base_of(model)
    folder = write_folder(tmp_path / "step-0", base, recipe.tokenizer(), plain_state(base))
    write_folder(folder, base, recipe.tokenizer(), plain_state(base))  # the second one replaces the first
    assert [f.name for f in tmp_path.iterdir()] == ["step-0"]
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(AutoModelForCausalLM.from_pretrained(pair[0]).state_dict())  # the tied head under its own name
    assert not any("lora" in n or "base_layer" in n for n in names)
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(plain(ids).logits, recipe.build()(ids).logits, atol=1e-2)


def test_the_canary_tells_stale_weights_from_other_ones() -> None:
    before, now = torch.linspace(-3, -1, 20, dtype=torch.float64), torch.linspace(-3, -1.004, 20, dtype=torch.float64)
    sampler = VLLMSampler(url=URL)
    sampler._compare(now, now, torch.float32)  # the first refresh
    sampler._before = before
    sampler._compare(now + 1e-5, now, torch.float32)
    assert sampler.measured["rollout/engine_drift"] == pytest.approx(1e-5)
    with pytest.raises(EngineError, match="weights of the refresh before"):  # a difference far below max_drift
        sampler._compare(before + 1e-5, now, torch.float32)
    with pytest.raises(EngineError, match="disagree on a fixed text"):
        sampler._compare(now - 0.5, now, torch.float32)
    sampler._compare(now - 0.05, now, torch.bfloat16)  # what bfloat16 may do
    sampler._before = now
    sampler._compare(now + 1e-5, now, torch.float32)  # an update that moved nothing says nothing


def test_arguments() -> None:
    for given, says in (
        ({}, "takes one of two"),
        ({"url": URL, "python": "/bin/sh"}, "takes one of two"),
        ({"python": "/no/such/python"}, "no such interpreter"),
        ({"url": URL, "max_drift": 0.0}, "must be positive"),
        ({"url": URL, "max_new_tokens": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            VLLMSampler(**given)
    with pytest.raises(EngineError, match="no vLLM server at"):
        VLLMServer(URL, Path()).meet()


@pytest.mark.parametrize(
    ("objective", "refused", "remark"),
    [
        (Objective(ReverseKL()), False, False),
        (Objective(ReverseKL(), SampledToken(), correction=TruncatedRatio()), False, False),
        (Objective(ReverseKL(), SampledToken()), False, True),
        (Objective(ReverseKL(), credit=Discounted(0.9)), False, True),
        (Objective(ReverseKL(), SampledToken(), correction=NoCorrection()), True, False),
        (
            Terms([Term(Objective(ReverseKL())), Term(Objective(ReverseKL(), SampledToken(), correction=NoCorrection()))]),
            True,
            False,
        ),
    ],
)
def test_the_gap_needs_a_correction(
    pair: tuple[Path, Path], objective: Objective, refused: bool, remark: bool, recwarn: pytest.WarningsRecorder
) -> None:
    refresh = RolloutRefresh(sampler=VLLMSampler(url=URL))
    module = tiny_module(pair, objective)
    if refused:
        with pytest.raises(DegenerateObjective, match="correction: TruncatedRatio"):
            refresh.declare(module)
        return
    refresh.declare(module)
    assert any("another engine writes" in str(w.message) for w in recwarn) is remark


# ---- with vLLM -----------------------------------------------------------------------------------------------------------
OPTIONS = ["--max-model-len", "128", "--max-num-seqs", "64", "--enforce-eager"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pair with attention heads of 32, the least that vLLM computes on a CPU."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"layers": 2, "heads": 2}
    return save_tiny(root / "student", hidden=64, seed=1, **sizes), save_tiny(root / "teacher", hidden=64, seed=2, **sizes)


@pytest.fixture(scope="module")
def started() -> VLLMSampler:
    python = os.environ.get("VLLM_PYTHON", "")
    assert Path(python).is_file(), "VLLM_PYTHON must name the interpreter of an environment with vLLM"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    return VLLMSampler(python=python, options=OPTIONS, max_new_tokens=24)


def load(server: VLLMServer, folder: Path) -> None:
    """Another model's weights, in the engine."""
    recipe = Student(str(folder))
    model = recipe.build()
    server.load(write_folder(server.folder / "other", model, recipe.tokenizer(), plain_state(model)))


class Forgetful(VLLMSampler):
    """Does not hand new weights over."""

    def give(self, *_: Any) -> None:
        """Nothing."""


def run(
    pair: tuple[Path, Path], root: Path, sampler: VLLMSampler, steps: int = 4, lora: LoRA | None = None
) -> tuple[Any, list[dict[str, float]]]:
    objective = Objective(ReverseKL(), SampledToken(), correction=TruncatedRatio())
    module = tiny_module(pair, objective, lora=lora, lr=3e-3)
    log = Logged()
    trainer = tiny_trainer(root, [RolloutRefresh(sampler=sampler, seed=5), log], max_steps=steps)
    trainer.fit(module, tiny_data(batch_size=32))
    return module, log.rows


class Logged(pl.Callback):
    """What every step logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step:  # the monitors have logged the step before
            self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.on_train_batch_start(trainer)


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [LoRA(r=8), None], ids=["LoRA", "all weights"])
def test_a_run_with_the_canary_passing(
    started: VLLMSampler, wide: tuple[Path, Path], tmp_path: Path, lora: LoRA | None
) -> None:
    module, rows = run(wide, tmp_path, started, lora=lora)
    drift = [row["rollout/engine_drift"] for row in rows]
    deviation = [row["train/ratio_deviation"] for row in rows]
    print("\ndrift", drift, "\nratio deviation", deviation, "\ntokens/s", [row["rollout/tokens_per_second"] for row in rows])
    assert len(rows) == 4 and max(drift) < 1e-3 and 0.0 < max(deviation) < 1e-2
    assert all(row["train/staleness"] == 0.0 and row["train/effective_sample"] > 0.999 for row in rows)
    begun = tiny_module(wide, lora=lora)
    begun.configure_model()
    assert max(float((p - weights(begun)[n]).abs().max()) for n, p in weights(module).items()) > 1e-3  # it learned


@pytest.mark.vllm
def test_a_stale_engine_is_refused(started: VLLMSampler, wide: tuple[Path, Path], tmp_path: Path) -> None:
    assert started.server is not None
    fresh = VLLMSampler(url=started.server.url, max_new_tokens=24)
    run(wide, tmp_path / "fresh", fresh, steps=1)  # a server that somebody else started, with the weights of this run's start
    with pytest.raises(EngineError, match="weights of the refresh before") as refused:
        run(wide, tmp_path / "stale", Forgetful(url=started.server.url, max_new_tokens=24))
    print("\n", refused.value)
    load(started.server, wide[1])  # another model's
    with pytest.raises(EngineError, match="disagree on a fixed text") as refused:
        run(wide, tmp_path / "stale", Forgetful(url=started.server.url, max_new_tokens=24))
    print("\n", refused.value)


@pytest.mark.vllm
@pytest.mark.parametrize("law", [Law(), Law(0.7, 0.9), Law(1.0, 1.0, 4)], ids=str)
def test_recorded_logprobs_are_those_of_the_law_that_drew(started: VLLMSampler, wide: tuple[Path, Path], law: Law) -> None:
    assert started.server is not None
    recipe = Student(str(wide[0]))
    model, vocabulary = recipe.build().eval(), Vocabulary.of(recipe.tokenizer())
    sampler = VLLMSampler(
        url=started.server.url, temperature=law.temperature, top_p=law.top_p, top_k=law.top_k, max_new_tokens=20
    )
    prompts = [tuple(vocabulary.tokenizer(f"{i}+{2 * i}=").input_ids) for i in range(10, 26)]
    written = sampler.write(model, prompts, range(16), vocabulary, 0)
    again = sampler.write(model, prompts, range(16), vocabulary, 0)
    assert [c.ids for c in written] == [c.ids for c in again] != [written[0].ids] * 16
    for prompt, completion in zip(prompts, written, strict=True):
        text = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            logits = model(text).logits[0, len(prompt) - 1 : -1, : vocabulary.size]
        expected = law.probabilities(logits).log().gather(-1, text[0, len(prompt) :, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-3)
        assert completion.ended == (completion.ids[-1] in vocabulary.eos_ids) and (
            completion.ended or len(completion.ids) == 20
        )


@pytest.mark.vllm
@pytest.mark.parametrize("at_once", [1, 8])
def test_vllm_is_a_teacher(started: VLLMSampler, wide: tuple[Path, Path], at_once: int) -> None:
    module = tiny_module(wide, Objective(ReverseKL(), TopK(8, "teacher")))
    module.configure_model()
    started.write(module.student, [(1, 5)], [0], module.vocabulary, 0)
    assert started.server is not None
    load(started.server, wide[1])
    text = [1, *range(4, 22)]
    ours = scores(module.teacher.model, text)
    assert torch.allclose(torch.tensor(started.server.score(text), dtype=torch.float64), ours, atol=1e-4)
    there = ServerTeacher(started.server.url, k=8, cache="", at_once=at_once)
    there.meet(module.vocabulary)
    prompts = [Prompt(i, "", (1, 5 + i, 7), row=i) for i in range(4)]
    texts = [Completion((6, 4 + i, 9, 2), (-1.0,) * 4, True, 0) for i in range(4)]
    rollout, found = module.join(prompts, texts), []
    laws = [t.laws(module.student, rollout.text, 22) for t in (module.teacher, there)]
    whole, told = (law.logits(0, 16).log_softmax(-1).topk(8) for law in laws)
    print("\nlargest difference of the top 8, per token:", (whole.values - told.values).abs().amax(-1))
    assert torch.equal(whole.indices, told.indices) and torch.allclose(whole.values, told.values, atol=1e-4)
    for teacher in (module.teacher, there):
        module.teacher = teacher
        module.zero_grad()
        loss = module.score(rollout, module.objective).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in module.student.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))
    with pytest.raises(ValueError, match="--max-logprobs 21"):  # vLLM allows 20 unless it is told otherwise
        ServerTeacher(started.server.url, k=21, cache="").meet(module.vocabulary)
