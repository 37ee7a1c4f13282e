"""A teacher that tells its top-k, the tail and the drawn token: what is accepted is exact, what is refused would not be."""

from __future__ import annotations

import itertools

import pytest
import torch

from opd_lightning.models.teachers.law_cache import TopKLaws
from opd_lightning.objectives import (
    BatchMean,
    Discounted,
    Extras,
    FullVocab,
    GeneralizedJSD,
    Immediate,
    KStep,
    Objective,
    Reliability,
    ReverseKL,
    SampledToken,
    Skewed,
    Tanh,
    TeacherEntropy,
    Term,
    Terms,
    TokenGap,
    TopK,
    WrittenToken,
)
from opd_lightning.objectives.partial import refuse_beyond
from opd_lightning.types import Completion, Prompt, Rollout, TableLaws
from tests.objectives.members import BASELINES, CREDITS, DIVERGENCES, FURTHER, SUPPORTS

KNOWN, VOCAB, ROWS, LENGTH = 3, 7, 4, 5
SUPPORTS = [*SUPPORTS, *(TopK(k, by, "sampled_tail") for k in (2, 3) for by in ("teacher", "intersection", "student"))]
GATES = [[], [TokenGap(at_least=0.0)], [Reliability()], [TeacherEntropy(at_most=1.0)]]


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, torch.Tensor, Rollout, TopKLaws]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = 2.0 * torch.randn(2, ROWS * LENGTH, VOCAB, generator=draw, dtype=torch.float64)
    drawn = torch.multinomial(student.softmax(-1), 1, generator=draw).view(ROWS, LENGTH)
    logprobs = student.log_softmax(-1).gather(-1, drawn.view(-1, 1)).view(ROWS, LENGTH)
    written = [Completion(tuple(i.tolist()), tuple(x.tolist()), True, 0) for i, x in zip(drawn, logprobs, strict=True)]
    rollout = Rollout.of([Prompt(i, "", (0,), row=i) for i in range(ROWS)], written, 0)
    law, tokens = teacher.log_softmax(-1), drawn.flatten()
    assert not (law.topk(KNOWN).indices == tokens[:, None]).any(-1).all()  # some drawn tokens lie in the tail
    top = law.topk(KNOWN)
    return student, law, rollout, TopKLaws(top.indices, top.values, tokens, law.gather(-1, tokens[:, None])[:, 0], VOCAB)


def outcome(objective: Objective, student: torch.Tensor, teacher: TableLaws | TopKLaws, rollout: Rollout) -> list[torch.Tensor]:
    leaf = student.clone().requires_grad_()
    known = KNOWN if isinstance(teacher, TopKLaws) else None
    out = objective(TableLaws(leaf), teacher, rollout, 2, Extras(known=known))
    out.loss.backward()
    assert leaf.grad is not None
    return [out.loss.detach(), out.token_loss, leaf.grad, out.stats.values["overlap"], out.stats.values["k3"]]


def fits(objective: Objective) -> bool:
    try:
        refuse_beyond(objective, KNOWN)
    except ValueError as error:
        assert "Write instead" in str(error)
        return False
    return True


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_what_is_accepted_is_exact_and_what_is_refused_is_not(world: tuple) -> None:
    student, law, rollout, told = world
    accepted, refused_rightly, refused = 0, 0, 0
    combinations = itertools.product([*DIVERGENCES, *FURTHER[:6], *FURTHER[-2:]], SUPPORTS, CREDITS, BASELINES, GATES)
    for divergence, support, credit, baseline, gates in combinations:
        if isinstance(support, WrittenToken):
            continue
        if (bool(gates) or credit is not CREDITS[0]) and divergence is not DIVERGENCES[0]:
            continue
        objective = Objective(divergence, support, credit, baseline, gates=gates, allow_degenerate=True)
        entrywise = support.sampled or credit.gamma or getattr(support, "closure", "") in ("raw", "stop_gradient")
        if entrywise and not divergence.separable:
            continue
        found = [outcome(objective, student, laws, rollout) for laws in (TableLaws(law), told)]
        if fits(objective):
            assert close(*found), objective
            accepted += 1
        else:
            refused += 1
            refused_rightly += not close(*found)
    assert accepted > 100 and refused_rightly > 0.7 * refused > 80, (accepted, refused_rightly, refused)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (Objective(ReverseKL()), "full vocabulary looks at all entries"),
        (Objective(ReverseKL(), TopK(2, "student")), "that the student finds likely"),
        (Objective(ReverseKL(), TopK(4, "teacher")), "raise model.teacher.k"),
        (Objective(ReverseKL(), TopK(2, "teacher"), target=Skewed(0.1)), "objective.target: TeacherLaw"),
        (Objective(ReverseKL(), TopK(2, "teacher"), temperature=2.0), "objective.temperature: 1.0"),
        (Objective(ReverseKL(), SampledToken(), credit=KStep(3)), "exact divergences of later states"),
        (Objective(ReverseKL(), SampledToken(), gates=[TeacherEntropy(at_most=1.0)]), "TeacherEntropy"),
        (
            Terms([Term(Objective(ReverseKL(), SampledToken())), Term(Objective(GeneralizedJSD(0.5), FullVocab()))]),
            "all entries",
        ),
    ],
)
def test_refusals_name_what_is_missing(objective: Objective, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        refuse_beyond(objective, KNOWN)


def test_common_choices_are_accepted() -> None:
    for objective in (
        Objective(ReverseKL(), SampledToken(), Discounted(0.9), BatchMean(), shaper=Tanh(2.0)),
        Objective(ReverseKL(), TopK(KNOWN, "teacher", "sampled_tail"), Immediate()),
    ):
        assert fits(objective)


def test_statistics_are_those_that_are_known(world: tuple) -> None:
    student, law, rollout, told = world
    objective = Objective(ReverseKL(), SampledToken())
    whole, coarse = (
        objective(TableLaws(student), laws, rollout, 16, Extras(known=known)).stats.values
        for laws, known in ((TableLaws(law), None), (told, KNOWN))
    )
    assert not {"reverse_kl", "teacher_entropy", "overlap"} & coarse.keys()  # 16 entries are more than it tells
    assert "overlap" in whole
    ids = law.topk(KNOWN).indices
    p, q = (x.log_softmax(-1).exp() for x in (student, law))
    heads = [torch.cat([x.gather(-1, ids), 1.0 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q)]
    by_hand = (heads[0] * (heads[0] / heads[1]).log()).sum(-1)
    assert torch.allclose(coarse["coarse_reverse_kl"], by_hand, rtol=1e-9)
    assert bool((coarse["coarse_reverse_kl"] <= whole["reverse_kl"] + 1e-12).all())


def test_entries_beyond_the_vocabulary_and_a_k_of_the_whole_vocabulary() -> None:
    law = torch.randn(5, VOCAB, dtype=torch.float64).log_softmax(-1)
    tokens = torch.tensor([0, 1, 2, 3, 4])
    drawn = law.gather(-1, tokens[:, None])[:, 0]
    top = law.topk(VOCAB)
    assert torch.allclose(TopKLaws(top.indices, top.values, tokens, drawn, VOCAB).logits(1, 4), law[1:4], atol=1e-12)
    ids, values = top.indices[:, :3].clone(), top.values[:, :3]
    ids[:, 1] = VOCAB + 5  # a padding row of the server's head
    found = TopKLaws(ids, values, tokens, drawn, VOCAB).logits(0, 5)
    assert torch.allclose(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(found.gather(-1, ids[:, :1]), values[:, :1]) and torch.allclose(
        found.gather(-1, tokens[:, None])[:, 0], drawn
    )
