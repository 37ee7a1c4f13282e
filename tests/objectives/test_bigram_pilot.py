"""What a truncated support does to a whole run: a bigram model distilled on its own chains, three seeds at once.

The raw top-k reverse KL descends the student's own mass on the support, and settles where it is the teacher's mass there
divided by e, while the most likely token stays right ("The Many Faces of On-Policy Distillation", arXiv 2605.11182). Every
other closure, the full vocabulary and the sampled token bring the student to the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opd_lightning.inspect.oracle import TableLaws
from opd_lightning.objectives import FullVocab, Objective, ReverseKL, SampledToken, Support, TopK
from opd_lightning.types import Rendering, Rollout

SEEDS, VOCAB, K = 3, 64, 5
CHAINS, LENGTH, STEPS = 32, 8, 200


@dataclass(frozen=True)
class Pair:
    """Logits of next tokens, (SEEDS * VOCAB, VOCAB): one table below the other, each visited by its own chains only."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def at_start(cls) -> Pair:
        generator = torch.Generator().manual_seed(0)
        teacher = 3.0 * torch.randn(SEEDS * VOCAB, VOCAB, generator=generator)
        return cls(teacher / 2 + torch.randn(SEEDS * VOCAB, VOCAB, generator=generator), teacher)

    def laws(self) -> tuple[Tensor, Tensor]:
        return self.student.softmax(-1), self.teacher.softmax(-1)

    def over_visits(self, per_state: Tensor) -> Tensor:
        """(SEEDS,) mean under the student's own stationary law."""
        law = self.student.softmax(-1).view(SEEDS, VOCAB, VOCAB)
        visits = torch.full((SEEDS, 1, VOCAB), 1.0 / VOCAB)
        for _ in range(50):
            visits = visits @ law
        return (visits[:, 0] * per_state.view(SEEDS, VOCAB)).sum(-1)

    def reverse_kl(self) -> Tensor:
        p, q = self.laws()
        return self.over_visits((p * (p / q).log()).sum(-1))

    def masses(self, by: str) -> tuple[Tensor, Tensor]:
        """Mass of student and teacher on the top-K of one of them."""
        p, q = self.laws()
        ids = (q if by == "teacher" else p).topk(K).indices
        return self.over_visits(p.gather(-1, ids).sum(-1)), self.over_visits(q.gather(-1, ids).sum(-1))

    def argmax_agreement(self) -> Tensor:
        return self.over_visits((self.student.argmax(-1) == self.teacher.argmax(-1)).float())


def chains(law: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (SEEDS * CHAINS, LENGTH + 1) and the table rows that their completions were drawn from."""
    table = torch.arange(SEEDS).repeat_interleave(CHAINS) * VOCAB
    tokens = [torch.randint(VOCAB, table.shape, generator=generator)]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(law[table + tokens[-1]], 1, generator=generator)[:, 0])
    ids = torch.stack(tokens, 1)
    return ids, table[:, None] + ids[:, :-1]


def distill(support: Support) -> tuple[Pair, float]:
    """The pair after training, and the mean loss of the last ten steps."""
    start = Pair.at_start()
    student = start.student.clone().requires_grad_(True)
    degenerate = isinstance(support, TopK) and support.closure == "raw"
    objective = Objective(ReverseKL(), support, allow_degenerate=degenerate)
    optimizer = torch.optim.Adam([student], lr=0.05, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    mask, none = torch.ones(SEEDS * CHAINS, LENGTH, dtype=torch.bool), torch.zeros(SEEDS * CHAINS, dtype=torch.long)
    losses = []
    for _ in range(STEPS):
        logprobs = student.detach().log_softmax(-1)
        ids, rows = chains(logprobs.exp(), generator)
        rollout = Rollout(
            text=Rendering(ids, none + LENGTH + 1, mask),
            sampler_logprobs=logprobs[rows, ids[:, 1:]],
            row=none,
            prompt_index=none,
            policy_step=none,
            ended=none.bool(),
        )
        states = rows.flatten()
        out = objective(TableLaws(student[states]), TableLaws(start.teacher[states]), rollout)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return Pair(student.detach(), start.teacher), sum(losses[-10:]) / 10


@pytest.mark.parametrize(("by", "tolerance"), [("teacher", 0.02), ("student", 0.2)])
def test_the_raw_top_k_drains_its_own_mass(by: str, tolerance: float) -> None:
    """To m_T / e exactly where the teacher chooses the support; nearly where it moves with the student."""
    before = Pair.at_start()
    after, loss = distill(TopK(K, by, "raw"))
    ours, theirs = after.masses(by)
    torch.testing.assert_close(ours, theirs / math.e, rtol=tolerance, atol=0.0)
    assert (ours < 0.75 * before.masses(by)[0]).all()  # it had more
    assert (after.reverse_kl() > before.reverse_kl()).all()  # and was closer
    assert loss < -0.2  # no divergence is negative: the alarm of this failure
    if by == "student":
        assert (after.argmax_agreement() > 0.95).all()  # greedy decoding hides it


@pytest.mark.parametrize(
    ("support", "kl_left", "mass_error"),
    [
        (TopK(K, "student", "stop_gradient"), 0.3, 0.02),
        (TopK(K, "student", "tail"), 0.3, 0.02),
        (TopK(K, "student", "renormalize"), 0.4, 0.1),  # blind to the mass outside
        (FullVocab(), 0.01, 0.01),
        (SampledToken(), 0.25, 0.1),  # noise of 256 tokens a step
    ],
    ids=repr,
)
def test_no_other_support_does(support: Support, kl_left: float, mass_error: float) -> None:
    before = Pair.at_start()
    after, _ = distill(support)
    ours, theirs = after.masses("student")
    torch.testing.assert_close(ours, theirs, rtol=mass_error, atol=0.0)
    assert (ours > before.masses("student")[0]).all()
    assert (after.reverse_kl() < kl_left * before.reverse_kl()).all()
