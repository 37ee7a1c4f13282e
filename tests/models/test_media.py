"""Models that look: images travel with the rows through sampler, both forward passes, loss, checkpoint and resume."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen2VLForConditionalGeneration

from opd_lightning.callbacks import OPDCheckpoint, RolloutRefresh
from opd_lightning.cli import main
from opd_lightning.data import ChatTemplate, CustomContext, JsonlPrompts
from opd_lightning.media import Media
from opd_lightning.models import AdapterOffTeacher, FrozenTeacher, LoRA, ServerTeacher, Student
from opd_lightning.models.distributions import laws_of
from opd_lightning.models.lora import base_of
from opd_lightning.models.tiny import save_tiny
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Completion, Prompt, Rollout
from tests.helpers import same, tiny_data, tiny_trainer, weights
from tests.looking import ALPHABET, QWEN, llava, qwen, qwen_prompts, rows_with_images, talking


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llava")
    return llava(folder / "student", 0), llava(folder / "teacher", 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions: the first seven about an image of their own, of unequal lengths, the others about none."""
    return rows_with_images(tmp_path_factory.mktemp("images"), [i < 7 for i in range(10)])


def looking_data(rows: Path, **kwargs: Any) -> Any:
    settings = {"prompts": JsonlPrompts(str(rows)), "held_out": 0, "batch_size": 4, "template": ChatTemplate()}
    return tiny_data(**{**settings, **kwargs})


def module_of(pair: tuple[Path, Path], teacher: Any = None, **student: Any) -> OPDModule:
    return OPDModule(
        Student(str(pair[0]), **student), teacher or FrozenTeacher(str(pair[1])), Objective(ReverseKL()), optimizer=adam
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def refresh(**kwargs: Any) -> RolloutRefresh:
    return RolloutRefresh(sampler=NativeSampler(max_new_tokens=5), seed=5, **kwargs)


def rolled(pair: tuple[Path, Path], prompts: Path, count: int = 10, **kwargs: Any) -> tuple[OPDModule, list[Prompt], Rollout]:
    """A module, its prompts, and what the student wrote behind them, all in one batch."""
    data_settings = {k: kwargs.pop(k) for k in ("teacher_template",) if k in kwargs}
    module = module_of(pair, **kwargs)
    module.configure_model()
    data = looking_data(prompts, **data_settings)
    data.vocabulary = module.vocabulary
    data.setup()
    asked = [replace(p, row=i) for i, p in enumerate(data.train_prompts[:count])]
    written = module.write(asked, "student", NativeSampler(max_new_tokens=5), list(range(count)))
    return module, asked, module.join(asked, written)


def laws(model: Any, rollout: Rollout, vocab: int) -> torch.Tensor:
    found = laws_of(model, rollout.text, vocab)
    return found.logits(0, len(found)).double().log_softmax(-1)


# ---- the whole way ---------------------------------------------


def test_steps_and_a_bit_exact_resume(pair: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    """Groups of two, micro-batches of two, one refresh for two steps: a run that stops between them goes on to the bit."""

    def run(root: Path, steps: int, **fit: Any) -> dict[str, torch.Tensor]:
        module = module_of(pair)
        callbacks = [refresh(every_n_steps=2, rollouts_per_prompt=2), OPDCheckpoint(every_n_steps=1, keep=0)]
        trainer = tiny_trainer(root, callbacks, max_steps=steps)
        trainer.fit(module, looking_data(prompts, batch_size=8, micro_batch_size=2), **fit)
        return weights(module)

    start = module_of(pair)
    start.configure_model()
    whole = run(tmp_path / "whole", 3)
    moved = {n for n, p in weights(start).items() if not torch.equal(p, whole[n])}
    assert any("vision_tower" in n for n in moved) and any("multi_modal_projector" in n for n in moved)
    kept = tmp_path / "whole" / "checkpoints" / "step-000001.ckpt"
    shown = [s["text"]["media"] for s in torch.load(kept, weights_only=True)["callbacks"]["RolloutRefresh"]["shards"]]
    assert any(m and "pixel_values" in m["whole"] for m in shown[0])
    again = run(tmp_path / "again", 3, ckpt_path=str(kept))
    assert same(whole, again)


def test_a_run_from_the_command_line(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps of an adapter student whose teacher is the same network, told the code of each image."""
    config = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run"), "logger": False},
        "model": {"student": {"path": str(pair[0]), "lora": {"r": 2}}, "teacher": "AdapterOffTeacher"},
        "data": {
            "prompts": {"class_path": "JsonlPrompts", "init_args": {"path": str(prompts)}},
            "held_out": 4,
            "template": "ChatTemplate",
            "teacher_template": {"class_path": "CustomContext", "init_args": {"wording": "{prompt} it is {code}."}},
            "batch_size": 4,
        },
        "rollout": {"sampler": {"max_new_tokens": 5}},
        "eval": {"sampler": {"max_new_tokens": 5}, "grader": {"class_path": "Contains", "init_args": {"answer_key": "code"}}},
        "report": {"controls": {}},
    }
    (tmp_path / "look.yaml").write_text(yaml.safe_dump(config))
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    assert main(["fit", "-c", str(tmp_path / "look.yaml"), "--trainer.enable_progress_bar", "false"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["opd"]["step"] == 2 and 0.0 < summary["opd"]["reverse_kl"] < 50.0
    assert "sampler: LlavaForConditionalGeneration is run by transformers" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval" / "student-000002.jsonl").read_text().splitlines()]
    assert [row["prompt"].startswith("[image] what") for row in rows] == [True, False, False, False]


# ---- the laws ---------------------------------------------


def test_what_was_recorded_is_what_is_scored(pair: tuple[Path, Path], prompts: Path) -> None:
    """Left-padded writing in one batch and right-padded scoring agree; a row among others is the row alone."""
    module, _, rollout = rolled(pair, prompts)
    size = module.vocabulary.size
    together = laws(module.student, rollout, size)
    unwritten = together.clone()
    unwritten[:, size - 1] = -torch.inf  # <image>, the last token, is never written
    drawn = unwritten.log_softmax(-1).gather(-1, rollout.text.targets[rollout.mask][:, None])[:, 0]
    assert torch.allclose(drawn.float(), rollout.sampler_logprobs[rollout.mask], atol=2e-5)
    alone = torch.cat([laws(module.student, rollout.select(torch.tensor([b])), size) for b in range(len(rollout))])
    assert torch.allclose(together, alone, atol=2e-5)
    assert not bool((rollout.text.targets[rollout.mask] == size - 1).any())


def test_another_image_is_another_law(pair: tuple[Path, Path], prompts: Path) -> None:
    module, _, rollout = rolled(pair, prompts)
    assert rollout.text.media is not None
    shown = list(rollout.text.media)
    other = replace(rollout, text=replace(rollout.text, media=(shown[1], shown[0], *shown[2:])))
    size, row = module.vocabulary.size, rollout.mask.nonzero(as_tuple=True)[0]
    with module.teacher.speaking(module.student) as teacher, torch.no_grad():
        before, after = laws(teacher, rollout, size), laws(teacher, other, size)
    moved = (before.exp() * (before - after)).sum(-1)
    assert float(moved[row < 2].mean()) > 1e-2
    assert float(moved[row >= 2].abs().max()) < 1e-9


@pytest.mark.parametrize("drop", ["all", "pixels"])
def test_no_pixels_is_an_error(pair: tuple[Path, Path], prompts: Path, drop: str) -> None:
    """Llava would read the placeholders as words and say nothing."""
    module, _, rollout = rolled(pair, prompts)
    assert rollout.text.media is not None
    blank = tuple(m and Media({}, m.tokens) for m in rollout.text.media)
    text = replace(rollout.text, media=None if drop == "all" else blank)
    with pytest.raises(ValueError, match="no pixels come with it"):
        module.score(replace(rollout, text=text), module.objective)
    assert len(module.student(input_ids=text.ids).logits) == len(rollout)  # type: ignore[misc]


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["whole", "adapters"])
def test_gradient_reaches_the_eyes(pair: tuple[Path, Path], prompts: Path, lora: LoRA | None) -> None:
    module, _, rollout = rolled(pair, prompts, lora=lora)
    out = module.score(rollout, module.objective)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    seen = [p.grad for n, p in module.student.named_parameters() if "vision_tower" in n and p.grad is not None]
    assert seen and any(float(g.abs().max()) > 0.0 for g in seen)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["whole", "adapters"])
def test_text_alone_gives_the_eyes_a_gradient_of_zero(pair: tuple[Path, Path], prompts: Path, lora: LoRA | None) -> None:
    """Not none at all: other processes, whose rows may look, wait for it. Below the first layer, so all take one way back."""
    module, _, rollout = rolled(pair, prompts, lora=lora)
    alone = rollout.select(torch.tensor([7, 8, 9]))
    assert alone.text.media is None or not any(alone.text.media)
    entered: list[bool] = []
    assert module.student is not None
    base: Any = base_of(module.student)
    first = base.get_decoder().layers[0]
    first.register_forward_pre_hook(lambda _, given, named: entered.append(given[0].requires_grad), with_kwargs=True)
    module.score(replace(alone, text=replace(alone.text, media=None)), module.objective).loss.backward()
    found = {n: p.grad for n, p in module.student.named_parameters() if p.requires_grad}
    assert all(g is not None for g in found.values()) and entered == [True]
    eyes = {n for n in found if "vision_tower" in n or "multi_modal_projector" in n}
    assert eyes and all(not found[n].any() for n in eyes)
    assert any(found[n].any() for n in set(found) - eyes)
    assert not base.get_input_embeddings()._forward_hooks


def test_a_run_that_shows_nothing_leaves_the_eyes_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """AdamW would decay weights whose gradient is zero."""
    module = module_of(pair)
    tiny_trainer(tmp_path, [refresh()], max_steps=2).fit(module, looking_data(rows_with_images(tmp_path, [False] * 6)))
    start = module_of(pair)
    start.configure_model()
    eyes = {n for n in weights(start) if "vision_tower" in n or "multi_modal_projector" in n}
    assert eyes and set(weights(start)) - set(weights(module)) == eyes
    assert module.student is not None and start.student is not None
    found, before = module.student.state_dict(), start.student.state_dict()
    assert all(torch.equal(found[n], before[n]) == (n in eyes) for n in weights(start))


def test_the_teacher_may_look_through_its_own_processor(pair: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    """It sees more pixels, so its prompt is longer; completions stay the key."""
    sharp = llava(tmp_path / "sharp", 2, size=16)
    module = module_of((pair[0], sharp))
    trainer = tiny_trainer(tmp_path, [refresh()], max_steps=1)
    data = looking_data(prompts)
    trainer.fit(module, data)
    first = data.train_prompts[0]
    assert first.teacher_ids is not None and first.media is not None and first.teacher_media is not None
    assert len(first.teacher_ids) - len(first.ids) == 16 - 4
    assert first.teacher_media.whole["pixel_values"].shape[-1] == 2 * first.media.whole["pixel_values"].shape[-1]


def test_a_context_leaves_the_image_where_it_is(pair: tuple[Path, Path], prompts: Path) -> None:
    context = CustomContext("{prompt} it is {code}.")
    module, asked, rollout = rolled(pair, prompts, teacher=AdapterOffTeacher(), lora=LoRA(r=2), teacher_template=context)
    ours, theirs = asked[0], asked[0].for_teacher
    assert module.vocabulary.decode(theirs[0]) == "what it is 0.="
    assert theirs[0][: len(ours.ids) - 1] == ours.ids[:-1]
    assert ours.media is not None and theirs[1] is not None and ours.media.digest() == theirs[1].digest()
    assert float(module.score(rollout, module.objective).loss.detach()) > 0.0


# ---- grids and turning positions ---------------------------------------------


def test_images_of_many_sizes_in_one_batch(tmp_path: Path) -> None:
    """Patches below each other, positions on three axes that the model rebuilds, rows that end early: as the rows alone."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen(tmp_path, 0)).eval()
    vocabulary = Vocabulary.of(talking(*QWEN))
    prompts = qwen_prompts([[(16, 8)], [], [(8, 24), (16, 16)], [(24, 24)]])
    sampler = NativeSampler(max_new_tokens=6)
    ids, shown = [p.ids for p in prompts], [p.media for p in prompts]
    with torch.no_grad():
        written = sampler.write(model, ids, [0, 1, 2, 3], vocabulary, 0, media=shown)
        one = [
            sampler.write(model, [i], [s], vocabulary, 0, media=[m])[0] for i, s, m in zip(ids, range(4), shown, strict=True)
        ]
        assert [c.ids for c in written] == [c.ids for c in one]
        closed = [Completion(c.ids[:n], c.logprobs[:n], True, 0) for c, n in zip(written, (6, 2, 4, 5), strict=True)]
        rollout = Rollout.of(prompts, closed, vocabulary.pad_id)
        found = laws(model, rollout, vocabulary.size)
        placeholders = list(range(vocabulary.size - 4, vocabulary.size - 2))
        drawn = found.index_fill(-1, torch.tensor(placeholders), -torch.inf).log_softmax(-1)
        drawn = drawn.gather(-1, rollout.text.targets[rollout.mask][:, None])[:, 0]
        assert torch.allclose(drawn.float(), rollout.sampler_logprobs[rollout.mask], atol=5e-5)
        for order in ([3, 1], [2, 0], [1]):
            part = rollout.select(torch.tensor(order))
            again = Rollout.from_state(Rollout.cat([part, rollout.select(torch.tensor([0]))]).state())
            expected = torch.cat([laws(model, rollout.select(torch.tensor([b])), vocabulary.size) for b in [*order, 0]])
            assert torch.allclose(laws(model, again, vocabulary.size), expected, atol=5e-5)


# ---- refusals ---------------------------------------------


def test_who_cannot_look_says_so(pair: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    text_only = save_tiny(tmp_path / "text", ALPHABET, hidden=32)
    talking("<image>").save_pretrained(text_only)

    def error(module: OPDModule, rows: Path) -> str:
        with pytest.raises((ValueError, OSError)) as raised:
            tiny_trainer(tmp_path, [refresh()], max_steps=1).fit(module, looking_data(rows))
        return str(raised.value)

    assert "reads text only: give a model with a processor" in error(module_of((text_only, pair[1])), prompts)
    film = tmp_path / "film.jsonl"
    film.write_text(json.dumps({"prompt": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]}) + "\n")
    assert "type 'video': text and images pass here" in error(module_of(pair), film)
    film.write_text(json.dumps({"prompt": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]}) + "\n")
    assert "Nothing is downloaded" in error(module_of(pair), film)
    with pytest.raises(ValueError, match="ServerTeacher reads text only"):
        ServerTeacher("http://localhost:1").processor(Student(str(pair[0])))
