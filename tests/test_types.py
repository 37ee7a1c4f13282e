from __future__ import annotations

import math

import torch

from opd_lightning.types import NOT_A_STUDENT, Completion, Prompt, Rollout


def rollout() -> Rollout:
    prompts = [
        Prompt(index=4, text="a", ids=(1, 5), teacher_ids=(1, 9, 9, 5), row=10),
        Prompt(index=7, text="b", ids=(1, 5, 6), teacher_ids=(1, 9, 9, 5, 6), row=11),
    ]
    completions = [
        Completion((7, 8, 2), (-0.1, -0.2, -0.3), ended=True, policy_step=3),
        Completion((4,), (math.nan,), ended=False, policy_step=NOT_A_STUDENT),
    ]
    return Rollout.of(prompts, completions, pad_id=0)


def test_alignment() -> None:
    r = rollout()
    assert r.text.ids.tolist() == [[1, 5, 7, 8, 2], [1, 5, 6, 4, 0]]
    assert r.text.targets[r.mask].tolist() == [7, 8, 2, 4]
    assert r.completion(0) == [7, 8, 2]
    recorded = r.sampler_logprobs[r.mask]
    torch.testing.assert_close(recorded, torch.tensor([-0.1, -0.2, -0.3, math.nan]), equal_nan=True)
    assert r.sampler_logprobs[~r.mask].tolist() == [0.0] * int((~r.mask).sum())


def test_the_teacher_sees_the_same_completion_tokens_behind_its_own_prompt() -> None:
    r = rollout()
    assert r.for_teacher.targets[r.for_teacher.mask].tolist() == r.text.targets[r.mask].tolist()
    assert r.for_teacher.ids[0].tolist() == [1, 9, 9, 5, 7, 8, 2]


def test_select_cuts_to_the_longest_row_and_cat_puts_back() -> None:
    r = rollout()
    short = r.select(torch.tensor([1]))
    assert short.text.ids.shape == (1, 4)
    again = Rollout.cat([r.select(torch.tensor([0])), short])
    assert again.text.ids.tolist() == r.text.ids.tolist()
    assert torch.equal(again.mask, r.mask)
    assert again.row.tolist() == [10, 11]
    assert torch.equal(again.for_teacher.mask, r.for_teacher.mask)


def test_state_is_plain_and_round_trips(tmp_path) -> None:
    r = rollout()
    torch.save(r.state(), tmp_path / "r.pt")
    again = Rollout.from_state(torch.load(tmp_path / "r.pt", weights_only=True))
    assert torch.equal(again.text.ids, r.text.ids)
    assert again.policy_step.tolist() == [3, NOT_A_STUDENT]
    assert again.teacher_text is not None


def test_to_moves_every_tensor() -> None:
    r = rollout().to(torch.device("meta"))
    assert r.text.ids.device.type == r.teacher_text.mask.device.type == r.row.device.type == "meta"


def test_cat_keeps_the_rows_that_the_teacher_reads_as_the_student_does() -> None:
    told = Rollout.of([Prompt(0, "", (1, 2), (1, 7, 2))], [Completion((3, 4), (-1.0,) * 2, True, 0)], 0)
    plain = Rollout.of([Prompt(1, "", (5, 6), row=1)], [Completion((3, 4, 8), (-1.0,) * 3, True, 0)], 0)
    for parts in ([told, plain], [plain, told]):
        theirs = Rollout.cat(parts).for_teacher
        assert [r[:n].tolist() for r, n in zip(theirs.ids, theirs.lengths, strict=True)] == [
            p.for_teacher.ids[0, : p.for_teacher.lengths[0]].tolist() for p in parts
        ]
    assert Rollout.cat([plain, plain]).teacher_text is None
