"""Sums of objectives: own weights, own rows, own denominators."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.inspect.oracle import TableLaws
from opd_lightning.objectives import (
    GAE,
    Constant,
    Extras,
    ForwardKL,
    FullVocab,
    Objective,
    PrefixProduct,
    ReferenceLaw,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    Term,
    Terms,
    TokenMean,
    TopK,
    UniformLaw,
    WrittenToken,
)
from opd_lightning.types import NOT_A_STUDENT, Completion, Prompt, Rollout

VOCAB, LENGTHS, OWN = 5, (3, 1, 4, 2), (True, False, True, False)


def mixed_batch(seed: int = 0) -> tuple[Rollout, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two completions of the student, two of a data set whose sampler is unknown."""
    generator = torch.Generator().manual_seed(seed)
    written = []
    for n, own in zip(LENGTHS, OWN, strict=True):
        ids = tuple(torch.randint(VOCAB, (n,), generator=generator).tolist())
        written.append(Completion(ids, (-1.5,) * n if own else (math.nan,) * n, True, 0 if own else NOT_A_STUDENT))
    prompts = [Prompt(i, "", (1,) * (1 + i % 2), row=i) for i in range(len(LENGTHS))]
    student, teacher, reference = torch.randn(3, sum(LENGTHS), VOCAB, generator=generator, dtype=torch.float64)
    return Rollout.of(prompts, written, 0), student.requires_grad_(True), teacher, reference


def tokens_of(rollout: Rollout) -> list[list[int]]:
    return [rollout.completion(b) for b in range(len(rollout))]


def offsets() -> list[int]:
    return [sum(LENGTHS[:b]) for b in range(len(LENGTHS))]


def by_hand(kind: str, student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor, rollout: Rollout) -> list:
    """Loss of every token, row by row, differentiable."""
    p, q, ref = (t.softmax(-1) for t in (student, teacher, reference))
    rows = []
    for b, (start, ids) in enumerate(zip(offsets(), tokens_of(rollout), strict=True)):
        row = []
        for t, v in enumerate(ids):
            i = start + t
            row.append(
                {
                    "reverse": lambda i=i, v=v: (p[i] * (p[i] / q[i]).log()).sum(),
                    "text": lambda i=i, v=v: -p[i, v].log(),
                    "leash": lambda i=i, v=v: (p[i] * (p[i] / ref[i]).log()).sum(),
                    "policy": lambda i=i, v=v, b=b: -p[i, v] / math.exp(-1.5) * float((q[i, v] / p[i, v]).log().detach()),
                }[kind]()
            )
        rows.append(row)
    return rows


def test_the_sum_written_out_by_hand() -> None:
    rollout, student, teacher, reference = mixed_batch()
    terms = Terms(
        [
            Term(Objective(ReverseKL(), FullVocab(), reduction=TokenMean()), 0.5),
            Term(Objective(ForwardKL(), WrittenToken(), reduction=SequenceMean()), 2.0, 1.0, rows="others"),
            Term(Objective(ReverseKL(), reduction=Constant(3.0), target=ReferenceLaw()), 0.0, 0.4),
            Term(Objective(ReverseKL(), SampledToken(), reduction=TokenMean()), rows="student"),
        ]
    )
    for progress in (0.0, 0.5, 1.0):
        reverse, text, leash, policy = (
            by_hand(kind, student, teacher, reference, rollout) for kind in ("reverse", "text", "leash", "policy")
        )
        expected = 0.5 * sum(map(sum, reverse)) / 10
        expected = expected + (2.0 - progress) * (sum(text[1]) / 1 + sum(text[3]) / 2) / 2
        expected = expected + 0.4 * progress * sum(map(sum, leash)) / (3.0 * 4)
        expected = expected + (sum(policy[0]) + sum(policy[2])) / 7
        extras = Extras(TableLaws(reference), None, progress)
        loss = terms(TableLaws(student), TableLaws(teacher), rollout, extras=extras).loss
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0.0)  # the recorded -1.5 is a float32
        found, exact = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(found, exact, atol=1e-6, rtol=0.0)


def test_denominators_count_the_rows_of_each_term() -> None:
    rollout = mixed_batch()[0]
    terms = Terms(
        [
            Term(Objective(ReverseKL())),
            Term(Objective(ReverseKL()), rows="student"),
            Term(Objective(ReverseKL(), reduction=SequenceMean()), rows="others"),
            Term(Objective(ReverseKL(), reduction=Constant(3.0)), rows="student"),
        ]
    )
    assert terms.denominators(rollout) == [10.0, 7.0, 2.0, 6.0]


ALL = Terms(
    [
        Term(Objective(ReverseKL(), SampledToken(), GAE(0.9, 0.8)), 0.7, rows="student"),
        Term(Objective(ForwardKL(), TopK(2, "teacher", "tail"), reduction=SequenceMean()), 1.3),
        Term(Objective(ForwardKL(), WrittenToken()), 0.2, 0.9, rows="others"),
        Term(Objective(ReverseKL(), target=UniformLaw(), reduction=Constant(4.0)), 0.05),
    ]
)


def part(rollout: Rollout, rows: list[int], tables: list[torch.Tensor]) -> tuple[Rollout, list[torch.Tensor]]:
    flat = torch.tensor([i for b in rows for i in range(offsets()[b], offsets()[b] + LENGTHS[b])])
    return rollout.select(torch.tensor(rows)), [table[flat] for table in tables]


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1, 3], [0, 2]]], ids=str)
def test_micro_batches_add_up_to_the_whole(split: list[list[int]]) -> None:
    """Also where a micro-batch has no row of some term."""
    rollout, student, teacher, reference = mixed_batch()
    critic = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss_of(rows: list[int], scale: tuple[float, ...]) -> torch.Tensor:
        chosen, (ours, theirs, third, values) = part(rollout, rows, [student, teacher, reference, critic])
        extras = Extras(TableLaws(third), values, 0.3)
        return ALL(TableLaws(ours), TableLaws(theirs), replace(chosen, scale=scale), extras=extras).loss

    parts = [ALL.denominators(rollout.select(torch.tensor(rows))) for rows in split]
    scale = tuple(1.0 / sum(shares) for shares in zip(*parts, strict=True))
    whole = loss_of([0, 1, 2, 3], ())
    total = sum(loss_of(rows, scale) for rows in split)
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=0.0)
    found, exact = (torch.autograd.grad(x, student)[0] for x in (total, whole))
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("correction", [{}, {"correction": PrefixProduct()}], ids=["token ratio", "prefix product"])
def test_unknown_samplers_of_rows_left_out_reach_neither_loss_nor_gradient(correction: dict) -> None:
    rollout, student, teacher, _ = mixed_batch()
    objective = Objective(ReverseKL(), SampledToken(), ReturnToGo(), **correction)
    out = Terms([Term(objective, rows="student")])(TableLaws(student), TableLaws(teacher), rollout)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert torch.isfinite(out.loss) and torch.isfinite(gradient).all()
    assert (out.token_loss[[1, 3]] == 0).all()
    assert gradient[3].abs().max() == 0 and gradient[8:].abs().max() == 0
    own, (ours, theirs) = part(rollout, [0, 2], [student, teacher])
    torch.testing.assert_close(objective(TableLaws(ours), TableLaws(theirs), own).loss, out.loss)
    with pytest.raises(ValueError, match="every token"):
        Terms([Term(objective)])(TableLaws(student), TableLaws(teacher), rollout)


def test_no_row_for_any_term_gives_a_zero_that_backpropagates() -> None:
    rollout, student, teacher, _ = mixed_batch()
    foreign, (ours, theirs) = part(rollout, [1, 3], [student, teacher])
    loss = Terms([Term(Objective(ReverseKL()), rows="student")])(TableLaws(ours), TableLaws(theirs), foreign).loss
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0 and gradient.abs().max() == 0


def test_needs_are_those_of_the_terms_together() -> None:
    assert ALL.needs_teacher and ALL.needs_critic and ALL.needs_sampler and not ALL.needs_reference
    text = Terms([Term(Objective(ForwardKL(), WrittenToken()))])
    assert not text.needs_teacher and not text.needs_sampler
    assert Terms([Term(Objective(ReverseKL(), target=ReferenceLaw()))]).needs_reference
    assert ALL.declared_target.defect is None
    assert "0.7 x " in ALL.declared_target.name and "(0.2 to 0.9) x " in ALL.declared_target.name


def test_refused_terms() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Terms([])
    with pytest.raises(ValueError, match="no Terms inside"):
        Terms([Term(ALL)])
    for keys in ({"weight": -1.0}, {"weight": 0.0}, {"weight": 1.0, "final_weight": -0.5}):
        with pytest.raises(ValueError, match="not both 0"):
            Term(Objective(ReverseKL()), **keys)
