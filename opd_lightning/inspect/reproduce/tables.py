"""Arms that train tables of logits with the package's own objectives: bigram models, and a student that is told less."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.inspect import floor
from opd_lightning.inspect.reproduce.arms import Arm, Curve, Networks, Record, Tick
from opd_lightning.objectives import FullVocab, Objective, ReverseKL, Support, TopK
from opd_lightning.types import Rendering, Rollout, TableLaws


class Bigram(Arm):
    """A bigram model, distilled on chains that it writes itself. All measures are exact, over its own stationary law.

    The teacher's logits are 3 N(0, 1), the student's half of them plus N(0, 1).

    Args:
        support: which entries are compared, with the reverse KL.
        vocab: tokens.
        steps: optimizer steps (Adam).
        rate: learning rate.
        chains: completions of a step.
        length: tokens of a completion.
        view: size of the student's top-k set that is watched.
    """

    # One argument a size of the toy.
    def __init__(
        self,
        support: Support = FullVocab(),
        vocab: int = 64,
        steps: int = 300,
        rate: float = 0.05,
        chains: int = 32,
        length: int = 16,
        view: int = 5,
    ) -> None:
        self.support, self.vocab, self.steps, self.rate = support, vocab, steps, rate
        self.chains, self.length, self.view = chains, length, view
        self.work = 0.004 * steps

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        generator = torch.Generator().manual_seed(seed)
        teacher = 3.0 * torch.randn(self.vocab, self.vocab, generator=generator)
        student = (teacher / 2 + torch.randn(self.vocab, self.vocab, generator=generator)).requires_grad_(True)
        raw = isinstance(self.support, TopK) and self.support.closure == "raw"
        objective = Objective(ReverseKL(), self.support, allow_degenerate=raw)
        optimizer = torch.optim.Adam([student], lr=self.rate, betas=(0.9, 0.98))
        curves: dict[str, Curve] = {"reverse_kl": [], "student_mass": [], "teacher_mass": [], "loss": []}
        mask = torch.ones(self.chains, self.length, dtype=torch.bool)
        none = torch.zeros(self.chains, dtype=torch.long)
        every = max(self.steps // 30, 1)
        for step in range(self.steps + 1):
            logprobs = student.detach().log_softmax(-1)
            if step % every == 0 or step == self.steps:
                for name, value in self._measured(logprobs, teacher.log_softmax(-1)).items():
                    curves[name].append((step, value))
            if step == self.steps:
                break
            ids = self._chains(logprobs.exp(), generator)
            recorded = logprobs[ids[:, :-1], ids[:, 1:]]
            rollout = Rollout(Rendering(ids, none + self.length + 1, mask), recorded, none, none, none, none.bool())
            states = ids[:, :-1].flatten()
            out = objective(TableLaws(student[states]), TableLaws(teacher[states]), rollout)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            if step % every == 0:
                curves["loss"].append((step, out.loss.item()))
            tick((step + 1) / self.steps)
        figures = {name: curve[-1][1] for name, curve in curves.items()}
        figures["kl_left"] = figures["reverse_kl"] / curves["reverse_kl"][0][1]
        figures["mass_times_e"] = math.e * figures["student_mass"] / figures["teacher_mass"]
        agree = (student.argmax(-1) == teacher.argmax(-1)).float()
        figures["argmax_agreement"] = float((self._visits(student.detach().softmax(-1)) * agree).sum())
        return Record(figures, curves)

    def _chains(self, law: Tensor, generator: torch.Generator) -> Tensor:
        tokens = [torch.randint(self.vocab, (self.chains,), generator=generator)]
        for _ in range(self.length):
            tokens.append(torch.multinomial(law[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, 1)

    def _visits(self, law: Tensor) -> Tensor:
        visits = torch.full((self.vocab,), 1.0 / self.vocab)
        for _ in range(50):
            visits = visits @ law
        return visits

    def _measured(self, student: Tensor, teacher: Tensor) -> dict[str, float]:
        visits, ids = self._visits(student.exp()), student.topk(self.view).indices
        found = {
            "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
            "student_mass": student.gather(-1, ids).exp().sum(-1),
            "teacher_mass": teacher.gather(-1, ids).exp().sum(-1),
        }
        return {name: float(visits @ value) for name, value in found.items()}


class ToldMore(Arm):
    """A student of a teacher that is told more: the toy of ``opd pi-floor``.

    Args:
        shared: the information is one rule for all rows.
        direction: of the KL.
        steps: optimizer steps.
    """

    def __init__(self, shared: bool, direction: floor.Direction = "reverse", steps: int = 80) -> None:
        self.shared, self.direction, self.steps = shared, direction, steps

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        found = floor.train(self.shared, self.direction, seed, self.steps)
        before, after, teacher = found.behaviour
        figures = {
            "removed": found.removed,
            "behaviour_of_teacher": after / teacher,
            "behaviour_gain": (after - before) / (teacher - before),
            "off_floor": abs(found.curve[-1] - found.floor),
            "floor": max(found.floor, 0.0),
        }
        return Record(figures, {"divergence": list(enumerate(found.curve))})
