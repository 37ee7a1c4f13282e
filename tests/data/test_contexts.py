"""What only the teacher is told: its prompt says it, the student's does not, and rows without it are not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.data import (
    Addition,
    AnswerOnly,
    ChatTemplate,
    Context,
    CustomContext,
    Demonstration,
    Feedback,
    FirstOf,
    Hint,
    Instruction,
    MaskedSolution,
    PlainTemplate,
    ReferenceSolution,
    SiblingSuccess,
    SystemPrompt,
    TaskPrompts,
    Template,
    Verdict,
)
from opd_lightning.data.group_contexts import Attempt
from opd_lightning.data.prompts import GivenPrompts, Row
from opd_lightning.metrics import Grader
from opd_lightning.models import NewStudent, Vocabulary
from opd_lightning.types import Completion, Prompt
from tests.helpers import tiny_data, tiny_module, tiny_trainer

ROW: dict[str, Any] = {"prompt": "2+3=", "completion": "add 2 and 3, that is 5", "answer": 5, "hint": "count {prompt}"}
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
GROUP = {
    **ROW,
    "attempt": Attempt(4, "it is {information} 6", 0.0),
    "siblings": [Attempt(5, "7", 0.0), Attempt(6, "<think>hm</think>is 5", 1.0), Attempt(7, "five", 1.0)],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return NewStudent("".join(map(chr, range(32, 127))) + "\n").tokenizer()


@pytest.fixture(scope="module")
def chatty(tokenizer: Any) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = CHAT
    return other


def told(context: Template, tokenizer: Any, row: Mapping[str, Any] = ROW, frame: Template = PlainTemplate()) -> str:
    return context.within(frame).text(row, tokenizer).removeprefix(tokenizer.bos_token or "")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (Instruction("Be brief.", "{prompt} {information}"), "2+3= Be brief."),
        (ReferenceSolution(wording="{information}|{prompt}"), "add 2 and 3, that is 5|2+3="),
        (AnswerOnly(), "2+3=\n\nThe final answer is 5."),
        (Hint(), "2+3=\n\nHint: count {prompt}"),  # braces in the data are text
        (Demonstration(wording="{prompt}:{information}"), "2+3=:add 2 and 3, that is 5"),
        (CustomContext("{prompt} [{answer}, {hint}]"), "2+3= [5, count {prompt}]"),
        (SystemPrompt("Be brief."), "Be brief.\n2+3="),
        (SiblingSuccess(wording="{prompt} {information}"), "2+3= is 5"),  # the first success of another, its thinking left out
        (SiblingSuccess(strip_thinking=False, wording="{prompt} {information}"), "2+3= <think>hm</think>is 5"),
        (Feedback(Verdict(answer="answer"), wording="{prompt} {attempt}: {information}"),
         "2+3= it is {information} 6: This is wrong. The right answer is 5."),
        (FirstOf([Hint("none"), AnswerOnly(wording="{prompt}{information}")]), "2+3=5"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Template) else "",
)  # fmt: skip
def test_what_the_teacher_reads(context: Context, expected: str, tokenizer: Any) -> None:
    assert told(context, tokenizer, GROUP) == expected
    assert context.within(PlainTemplate()).informed(GROUP)


@pytest.mark.parametrize(
    ("context", "row"),
    [
        (ReferenceSolution(), {"prompt": "x"}),
        (AnswerOnly(), {"prompt": "x", "answer": None}),
        (Hint(), {"prompt": "x", "hint": "  "}),
        (CustomContext("{prompt} {a} {b}"), {"prompt": "x", "a": 1}),
        (SiblingSuccess(), ROW),
        (
            SiblingSuccess(),
            {**ROW, "attempt": Attempt(4, "5", 1.0), "siblings": [Attempt(5, "7", 0.9)]},
        ),  # only the own success
        (Feedback(), {**ROW, "attempt": Attempt(4, "5", 1.0)}),
        (FirstOf([Hint(), AnswerOnly()]), {"prompt": "x"}),
    ],
)
def test_rows_without_information(context: Context, row: dict[str, Any], tokenizer: Any) -> None:
    assert not context.within(PlainTemplate()).informed(row)


def test_nothing_but_the_information_differs_from_the_students_prompt(chatty: Any) -> None:
    frame = ChatTemplate(shots=[["1+1=", "2"]])
    student = frame.text(ROW, chatty)
    instructed = told(Instruction("Be brief.", "{prompt} {information}"), chatty, frame=frame)
    assert instructed == student.replace("2+3=", "2+3= Be brief.")
    assert told(SystemPrompt("Be brief."), chatty, frame=frame) == "[system]Be brief." + student
    messages = {"prompt": [{"role": "user", "content": "hi"}, {"role": "user", "content": "2+3="}], "answer": 5}
    found = told(AnswerOnly(wording="{prompt}{information}"), chatty, messages, ChatTemplate())
    assert found == "[user]hi[user]2+3=5[assistant]"


def test_masked_solutions_hide_their_share_and_stay_the_same(tokenizer: Any) -> None:
    found = told(MaskedSolution(0.5, wording="{prompt}{information}"), tokenizer).removeprefix("2+3=")
    words, kept = ROW["completion"].replace(",", "").split(), found.replace(",", "").split()
    assert len(kept) == len(words) == 7 and kept.count("___") == round(0.5 * 7)
    assert all(k in ("___", w) for k, w in zip(kept, words, strict=True))
    assert found == told(MaskedSolution(0.5, wording="{prompt}{information}"), tokenizer).removeprefix("2+3=")
    others = {told(MaskedSolution(0.5, seed=s), tokenizer) for s in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize(
    "make", [lambda: Hint(wording="{information}"), lambda: CustomContext("{prompt}"), lambda: FirstOf([])]
)
def test_wordings_without_their_places_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"place for what|at least one"):
        make()


# ---- in a run ---------------------------------------------------------------------------------------------------------------


class Parity(Grader):
    """Half of all rollouts succeed, by the length of what they say."""

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        return float(len(completion) % 2)


def test_siblings_are_graded_and_the_own_success_is_left_out(pair: tuple[Path, Path]) -> None:
    data = tiny_data(
        teacher_template=SiblingSuccess(grader=Parity(), wording="{prompt}{information}"), template=PlainTemplate()
    )
    data.vocabulary = Vocabulary.of(NewStudent("0123456789+=,;&c#").tokenizer())
    data.setup()
    assert not any(p.informed or p.teacher_ids for p in data.train_prompts)
    vocabulary = data.vocabulary
    texts = ["1", "22", "333", "44", "55", "666"]  # successes: rows 0, 2, 5; groups of three
    prompts = [Prompt(0, "9+9=", (1, 2), fields={"prompt": "9+9="}, row=r) for r in range(6)]
    written = [
        Completion((*vocabulary.tokenizer(t, add_special_tokens=False).input_ids, vocabulary.eos_ids[0]), (), True, 0)
        for t in texts
    ]
    found = data.inform(prompts, written, group=3)
    read = [vocabulary.decode(p.teacher_ids) if p.teacher_ids else None for p in found]
    assert read == ["9+9=333", "9+9=1", "9+9=1", "9+9=666", "9+9=666", None]
    assert [p.informed for p in found] == [True, True, True, True, True, False]


class Gappy(TaskPrompts):
    """Every second row has a hint."""

    def rows(self) -> list[Row]:
        return [{**row, **({"hint": "12"} if i % 2 else {})} for i, row in enumerate(super().rows())]


def leak_by_hand(batch: Any, told: torch.Tensor) -> float:
    """Mean share of 3-grams of the completions that the teacher's prompt has and the student's has not."""

    def grams(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]

    shares = []
    for b in told.nonzero().squeeze(-1).tolist():
        written = batch.completion(b)
        ours, theirs = (
            grams(text.ids[b, : int(text.lengths[b]) - len(written)].tolist()) for text in (batch.text, batch.teacher_text)
        )
        secret = set(theirs) - set(ours)
        if len(written) >= 3 and secret:
            shares.append(sum(g in secret for g in grams(written)) / (len(written) - 2))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(
    "context", [Hint(wording="{prompt}{information}"), SiblingSuccess(grader=Parity(), wording="{prompt}{information}")]
)
def test_rows_without_information_are_masked_and_their_share_is_logged(
    context: Context, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    module = tiny_module(pair)
    rollout = RolloutRefresh(rollouts_per_prompt=2, seed=5)
    data = tiny_data(prompts=Gappy(Addition(digits=2), 40, 3), template=PlainTemplate(), teacher_template=context)
    trainer = tiny_trainer(tmp_path, [rollout], max_steps=1)
    trainer.fit(module, data)
    batch = rollout.buffer.rollout
    trained = batch.mask.any(-1)
    assert 0 < trained.sum() < 8
    assert trainer.callback_metrics["rollout/informed"] == pytest.approx(trained.float().mean().item())
    assert torch.equal(trained, batch.teacher_text.mask.any(-1))
    assert trainer.callback_metrics["rollout/leak"] == pytest.approx(leak_by_hand(batch, trained), nan_ok=True)
    assert 0.0 <= trainer.callback_metrics["rollout/leak_control"] <= 1.0
    assert rollout.buffer.scales[0][0] == pytest.approx(
        1.0 / float(batch.mask.sum())
    )  # the denominator counts what is trained on
    if isinstance(context, Hint):
        assert trained.tolist() == [data.train_prompts[i].informed for i in batch.prompt_index.tolist()]


def test_a_batch_that_nobody_is_told_about_changes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from tests.helpers import same, weights

    class Never(Grader):
        def __call__(self, row: Mapping[str, Any], completion: str) -> float:
            return 0.0

    module = tiny_module(pair, lr=1e-2)
    module.configure_model()
    before = weights(module)
    data = tiny_data(template=PlainTemplate(), teacher_template=SiblingSuccess(grader=Never()))
    trainer = tiny_trainer(tmp_path, [RolloutRefresh(rollouts_per_prompt=4, seed=5)], max_steps=1)
    trainer.fit(module, data)
    assert trainer.callback_metrics["rollout/informed"] == 0.0
    assert all(torch.isfinite(w).all() for w in weights(module).values())
    for name, w in weights(module).items():
        torch.testing.assert_close(w, before[name] * (1 - 1e-2 * 1e-2))  # AdamW's weight decay alone
    assert not same(before, {})


def test_a_context_that_no_row_can_fill_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tiny_data(template=PlainTemplate(), teacher_template=Hint())
    with pytest.raises(ValueError, match="their columns are prompt, completion, answer"):
        tiny_trainer(tmp_path).fit(tiny_module(pair), data)


def test_held_out_rows_need_no_information(pair: tuple[Path, Path], tmp_path: Path) -> None:
    held = TaskPrompts(Addition(digits=2), size=4, seed=9)
    data = tiny_data(
        prompts=Gappy(Addition(digits=2), 40, 3),
        held_out=0,
        held_out_prompts=held,
        template=PlainTemplate(),
        teacher_template=Hint(),
    )
    tiny_trainer(tmp_path, max_steps=1).fit(tiny_module(pair), data)
    assert len(data.eval_prompts) == 4 and not any(p.informed for p in data.eval_prompts)


def test_a_group_context_needs_a_grader(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tiny_data(prompts=GivenPrompts(["1+1="] * 9), held_out=0, teacher_template=SiblingSuccess())
    with pytest.raises(ValueError, match=r"data\.teacher_template\.grader"):
        tiny_trainer(tmp_path).fit(tiny_module(pair), data)
