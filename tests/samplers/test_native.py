from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_lightning.models import Student, Vocabulary
from opd_lightning.models.distributions import laws_of
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Prompt, Rollout

PROMPTS = [(1, *([5] * (i % 4 + 1)), 7) for i in range(12)]
SEEDS = list(range(100, 112))


@pytest.fixture(scope="module")
def model(pair: tuple[Path, Path]) -> torch.nn.Module:
    return Student(str(pair[0])).build().eval()


@pytest.fixture(scope="module")
def vocabulary(pair: tuple[Path, Path]) -> Vocabulary:
    return Vocabulary.of(Student(str(pair[0])).tokenizer())


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_what_is_written_depends_on_the_row_alone(model: torch.nn.Module, vocabulary: Vocabulary, engine: str) -> None:
    """Alone, in small batches, in one batch, in another order: the same completion for the same prompt and seed."""
    whole = NativeSampler(max_new_tokens=20, engine=engine).write(model, PROMPTS, SEEDS, vocabulary, 0)
    assert len({c.ids for c in whole}) > 6
    small = NativeSampler(max_new_tokens=20, batch_size=5, engine=engine).write(model, PROMPTS, SEEDS, vocabulary, 0)
    back = NativeSampler(max_new_tokens=20, engine=engine).write(model, PROMPTS[::-1], SEEDS[::-1], vocabulary, 0)[::-1]
    for i in range(len(PROMPTS)):
        assert whole[i].ids == small[i].ids == back[i].ids


def test_it_leaves_the_global_random_state_alone(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    before = torch.get_rng_state()
    NativeSampler(max_new_tokens=5).write(model, PROMPTS, SEEDS, vocabulary, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_recorded_logprobs_are_those_of_the_training_forward(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    written = NativeSampler(max_new_tokens=20).write(model, PROMPTS, SEEDS, vocabulary, 3)
    rollout = Rollout.of([Prompt(0, "", p) for p in PROMPTS], written, vocabulary.pad_id)
    laws = laws_of(model, rollout.text, vocabulary.size)
    law = laws.logits(0, len(laws)).log_softmax(-1)
    expected = law.gather(-1, rollout.text.targets[rollout.mask][:, None]).squeeze(-1)
    torch.testing.assert_close(rollout.sampler_logprobs[rollout.mask], expected, atol=2e-6, rtol=0.0)
    assert rollout.policy_step.tolist() == [3] * len(PROMPTS)


def test_a_completion_ends_with_eos_or_at_the_limit(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    written = NativeSampler(max_new_tokens=20).write(model, PROMPTS, SEEDS, vocabulary, 0)
    assert any(c.ended for c in written) and any(not c.ended for c in written)
    for c in written:
        ends = [t in vocabulary.eos_ids for t in c.ids]
        assert sum(ends) == int(c.ended) and (not c.ended or ends[-1])
        assert c.ended or len(c.ids) == 20
        assert len(c.logprobs) == len(c.ids)


def test_progress_counts_rows_as_they_finish(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    seen: list[int] = []
    NativeSampler(max_new_tokens=20, batch_size=8).write(model, PROMPTS, SEEDS, vocabulary, 0, seen.append)
    assert seen == sorted(set(seen)) and seen[-1] == len(PROMPTS)
    assert len(seen) > 2  # batches of 8


def test_nothing_to_write(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    assert NativeSampler().write(model, [], [], vocabulary, 0) == []


def test_frequencies_follow_the_law(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    """Chi-square of 6000 first tokens against the model's law; the seed is fixed, so this does not flicker."""
    count, prompt = 6000, (1, 5, 7)
    sampler = NativeSampler(max_new_tokens=1, batch_size=1000)
    written = sampler.write(model, [prompt] * count, list(range(count)), vocabulary, 0)
    seen = torch.bincount(torch.tensor([c.ids[0] for c in written]), minlength=vocabulary.size).double()
    law = model(input_ids=torch.tensor([prompt])).logits[0, -1, : vocabulary.size].double().softmax(-1) * count
    statistic = ((seen - law).square() / law).sum().item()
    freedom = vocabulary.size - 1
    assert freedom - 4 * (2 * freedom) ** 0.5 < statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_greedy_equals_transformers(model: torch.nn.Module, vocabulary: Vocabulary) -> None:
    prompt = (1, 5, 6, 7)
    mine = NativeSampler(temperature=0.0, max_new_tokens=15).write(model, [prompt], [0], vocabulary, 0)[0]
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4), do_sample=False, max_new_tokens=15, pad_token_id=0
    )
    assert list(mine.ids) == theirs[0, 4:].tolist()
    assert set(mine.logprobs) == {0.0}


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_the_recorded_law_is_the_truncated_one(model: torch.nn.Module, vocabulary: Vocabulary, settings: dict) -> None:
    prompt = (1, 5, 7)
    sampler = NativeSampler(max_new_tokens=1, batch_size=400, **settings)
    written = sampler.write(model, [prompt] * 400, list(range(400)), vocabulary, 0)
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double() / settings.get("temperature", 1.0)
    kept = logits.topk(settings.get("top_k", len(logits))).indices.tolist()
    law = torch.full_like(logits, -torch.inf)
    law[kept] = logits[kept]
    law = law.softmax(-1)
    if "top_p" in settings:  # the smallest set with that mass
        nucleus, mass = [], 0.0
        for v in law.argsort(descending=True).tolist():
            if mass >= settings["top_p"]:
                break
            nucleus.append(v)
            mass += float(law[v])
        law = torch.zeros_like(law).index_copy(0, torch.tensor(nucleus), law[nucleus] / law[nucleus].sum())
    for c in written:
        assert law[c.ids[0]] > 0
        assert c.logprobs[0] == pytest.approx(float(law[c.ids[0]].log()), abs=1e-5)


def test_padding_rows_are_never_sampled(pair: tuple[Path, Path], vocabulary: Vocabulary) -> None:
    model = Student(str(pair[0])).build().eval()
    model.resize_token_embeddings(vocabulary.size + 40, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[vocabulary.size :] = 100.0
    written = NativeSampler(max_new_tokens=10).write(model, PROMPTS, SEEDS, vocabulary, 0)
    assert max(t for c in written for t in c.ids) < vocabulary.size


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"engine": "vllm"}], ids=str
)
def test_bad_settings_name_the_key(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"sampler.{next(iter(bad))}"):
        NativeSampler(**bad)
