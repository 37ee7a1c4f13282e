"""The objective on batches: chunks, masks, refusals, reductions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from opd_lightning.objectives import (
    ClosedFormBaseline,
    Constant,
    DegenerateObjective,
    Discounted,
    ForwardKL,
    FullVocab,
    GeneralizedJSD,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    TokenMean,
    TopK,
)
from opd_lightning.types import Completion, Prompt, Rollout

VOCAB = 11


@dataclass
class Laws:
    table: torch.Tensor
    vocab: int = VOCAB
    most: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def logits(self, start: int, stop: int) -> torch.Tensor:
        self.most = max(self.most, stop - start)
        return self.table[start:stop]


def batch(lengths: list[int], seed: int = 0) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [Prompt(i, "", (1,) * (1 + i % 3), row=i) for i in range(len(lengths))]
    written = [
        Completion(tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()), (-2.3,) * n, True, 0) for n in lengths
    ]
    student, teacher = torch.randn(2, sum(lengths), VOCAB, generator=generator, dtype=torch.float64)
    return Rollout.of(prompts, written, 0), student.requires_grad_(True), teacher


COMPOSITIONS = [
    Objective(ReverseKL()),
    Objective(ForwardKL(), TopK(3, "teacher", "tail"), Discounted(0.5)),
    Objective(ReverseKL(), SampledToken(), ReturnToGo(), ClosedFormBaseline()),
    Objective(GeneralizedJSD(0.2), FullVocab(), reduction=SequenceMean(), temperature=2.0),
]
each = pytest.mark.parametrize("composition", COMPOSITIONS, ids=repr)


@each
def test_padding_and_prompts_never_count(composition: Objective) -> None:
    rollout, student, teacher = batch([5, 2, 7])
    out = composition(Laws(student), Laws(teacher), rollout)
    pad = torch.nn.functional.pad
    wide = replace(
        rollout,
        text=replace(rollout.text, ids=pad(rollout.text.ids, (0, 9), value=7), mask=pad(rollout.mask, (0, 9))),
        sampler_logprobs=pad(rollout.sampler_logprobs, (0, 9), value=math.nan),
    )
    again = composition(Laws(student), Laws(teacher), wide)
    torch.testing.assert_close(again.loss, out.loss)
    assert (out.token_loss[~rollout.mask] == 0).all()


@each
def test_an_empty_batch_gives_a_zero_that_backpropagates(composition: Objective) -> None:
    rollout, _, _ = batch([2, 3])
    nothing = replace(rollout, text=replace(rollout.text, mask=torch.zeros_like(rollout.mask)))
    student = torch.zeros(0, VOCAB, requires_grad=True)
    out = composition(Laws(student), Laws(torch.zeros(0, VOCAB)), nothing)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert student.grad is not None


@each
def test_masked_logits_in_both_models_stay_finite(composition: Objective) -> None:
    rollout, student, teacher = batch([4, 6])
    with torch.no_grad():
        student[:, 0] = -math.inf  # tokens 2.. are drawn; 0 is padding of the vocabulary
        teacher[:, 0] = -math.inf
    out = composition(Laws(student), Laws(teacher), rollout, agreement_k=4)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert torch.isfinite(out.loss) and torch.isfinite(gradient).all()
    assert all(torch.isfinite(v).all() for v in out.stats.values.values())


@each
def test_an_identical_teacher_teaches_nothing(composition: Objective) -> None:
    rollout, student, _ = batch([4, 6])
    out = composition(Laws(student), Laws(student.detach().clone()), rollout)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert abs(out.loss.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


def test_gradient_reaches_the_student_only() -> None:
    rollout, student, teacher = batch([4, 6])
    teacher.requires_grad_(True)
    for composition in COMPOSITIONS:
        out = composition(Laws(student), Laws(teacher), rollout)
        found = torch.autograd.grad(out.loss, [student, teacher], allow_unused=True)
        assert found[0].abs().max() > 0
        assert found[1] is None


def test_reductions_by_hand() -> None:
    rollout, student, teacher = batch([1, 3, 8])
    p, q = (t.detach().log_softmax(-1) for t in (student, teacher))
    kl = (p.exp() * (p - q)).sum(-1)
    rows = kl.split([1, 3, 8])
    for reduction, expected in (
        (TokenMean(), kl.mean()),
        (SequenceMean(), torch.stack([r.mean() for r in rows]).mean()),
        (Constant(5.0), torch.stack([r.sum() / 5.0 for r in rows]).mean()),
    ):
        loss = Objective(ReverseKL(), reduction=reduction)(Laws(student), Laws(teacher), rollout).loss
        torch.testing.assert_close(loss, expected)


def test_a_scale_takes_the_place_of_the_batchs_own_denominator() -> None:
    rollout, student, teacher = batch([1, 3, 8])
    plain = Objective(ReverseKL())(Laws(student), Laws(teacher), rollout).loss
    scaled = Objective(ReverseKL())(Laws(student), Laws(teacher), replace(rollout, scale=(0.5,))).loss
    torch.testing.assert_close(scaled, plain * 12 * 0.5)


def test_off_policy_ratio_enters_the_sampled_token() -> None:
    rollout, student, teacher = batch([3])
    out = Objective(ReverseKL(), SampledToken())(Laws(student), Laws(teacher), rollout)
    p, q = (t.detach().log_softmax(-1) for t in (student, teacher))
    tokens = rollout.text.targets[rollout.mask]
    s, t = (law.gather(-1, tokens[:, None]).squeeze(-1) for law in (p, q))
    torch.testing.assert_close(out.loss, ((s + 2.3).exp() * (s - t)).mean(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.stats.values["ratio_deviation"], ((s + 2.3).exp() - 1).abs(), atol=1e-6, rtol=1e-6)


def test_refusals_say_what_to_write_instead() -> None:
    with pytest.raises(DegenerateObjective, match=r"(?s)loss and gradient are exactly 0.*Write instead: support\.k: 16"):
        Objective(ReverseKL(), TopK(1, "student", "renormalize"))
    with pytest.raises(DegenerateObjective, match="FullVocab"):
        Objective(ForwardKL(), SampledToken())
    with pytest.raises(ValueError, match="temperature"):
        Objective(ReverseKL(), temperature=0.0)


def test_declared_targets_read_like_sentences() -> None:
    assert str(Objective(ReverseKL(), reduction=Constant(8.0)).declared_target) == (
        "token-level reverse KL (full vocabulary, immediate credit, sum / 8): unbiased"
    )
    target = Objective(ReverseKL(), TopK(16, "student", "tail"), ReturnToGo(), reduction=Constant(8.0)).declared_target
    assert target.name == "sequence-level reverse KL of the top-k-plus-tail coarsening"
    assert "lower bound" in str(target)
    assert "nor that of any scalar" in str(Objective(ReverseKL(), credit=Discounted(0.9)).declared_target)


@each
def test_columns_that_neither_can_draw_might_as_well_not_be_there(composition: Objective) -> None:
    rollout, student, teacher = batch([4, 6])
    with torch.no_grad():
        for table in (student, teacher):
            table[:, -1] = -math.inf
    few = rollout.text.ids.clamp(max=VOCAB - 2)
    rollout = replace(rollout, text=replace(rollout.text, ids=few))
    whole = composition(Laws(student), Laws(teacher), rollout)
    short = student.detach()[:, :-1].requires_grad_(True)
    cut = composition(Laws(short, VOCAB - 1), Laws(teacher[:, :-1], VOCAB - 1), rollout)
    (gradient,), (smaller,) = torch.autograd.grad(whole.loss, student), torch.autograd.grad(cut.loss, short)
    torch.testing.assert_close(whole.loss, cut.loss, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(gradient[:, :-1], smaller, atol=1e-12, rtol=0.0)
    assert gradient[:, -1].abs().max() < 1e-12


@each
def test_scoring_begins_before_the_first_completion_token_and_ends_with_the_last(composition: Objective) -> None:
    """The law behind the prompt is trained; what stands behind the completion is not looked at."""
    rollout, student, teacher = batch([3, 5])
    out = composition(Laws(student), Laws(teacher), rollout)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert gradient[0].abs().max() > 0 and gradient[3].abs().max() > 0
    ids = rollout.text.ids.clone()
    after = torch.arange(ids.shape[1]) >= rollout.text.lengths[:, None]
    assert after.any()
    ids[after] = 7
    moved = replace(rollout, text=replace(rollout.text, ids=ids))
    torch.testing.assert_close(composition(Laws(student), Laws(teacher), moved).loss, out.loss, atol=0.0, rtol=0.0)
