"""Arms that look at a student's own completions through a teacher, without training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_lightning.inspect.reproduce.arms import Arm, Curve, Networks, Record, Tick
from opd_lightning.inspect.reproduce.digits import DigitSum, GrammarTeacher, Laws, continued, correct, prompts
from opd_lightning.inspect.reproduce.training import quiet
from opd_lightning.models import FrozenTeacher, Student, Teacher
from opd_lightning.module import OPDModule
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold
from opd_lightning.types import Completion, Prompt, Rollout

COUNT, PROMPT_SEED = 512, 11


def built(student: str, teacher: str | Teacher, seed: int, networks: Networks) -> OPDModule:
    """Both models, ready to write and to score."""
    theirs = FrozenTeacher(str(networks.path(teacher, seed))) if isinstance(teacher, str) else teacher
    module = OPDModule(Student(str(networks.path(student, seed))), theirs, Objective(ReverseKL()))
    with quiet():
        module.configure_model()
    return module


def written(module: OPDModule, task: DigitSum, seed: int, who: str = "student") -> tuple[list[Prompt], list[Completion]]:
    """Completions of held-out prompts at temperature 1."""
    asked = [Prompt(i, "", tuple(ids), row=i) for i, ids in enumerate(prompts(task, COUNT, PROMPT_SEED).tolist())]
    sampler = NativeSampler(max_new_tokens=2 * task.digits + 6, batch_size=COUNT)
    return asked, module.write(asked, who, sampler, [fold(seed, who, p.row) for p in asked])


def network_law(model: nn.Module) -> Laws:
    """The law of a network in the form of a `GrammarTeacher`'s function."""

    @torch.no_grad()
    def law(ids: Tensor, vocab: int) -> Tensor:
        logits: Tensor = model(input_ids=ids[:, :-1]).logits
        return logits[..., :vocab].log_softmax(-1)

    return law


def joined(module: OPDModule, asked: list[Prompt], done: list[Completion]) -> Tensor:
    """(B, L) prompts with completions."""
    return module.join(asked, done).text.ids


class Continuation(Arm):
    """How much better does the teacher finish what the student has begun, by the length of the beginning?

    Args:
        student: name of a network.
        teacher: who goes on: a network or a law.
        task: the prompts.
        prefixes: lengths of the beginnings, in tokens.
    """

    def __init__(self, student: str, teacher: str | GrammarTeacher, task: DigitSum, prefixes: list[int]) -> None:
        self.student, self.teacher, self.task, self.prefixes = student, teacher, task, prefixes
        self.needs = (student, teacher) if isinstance(teacher, str) else (student,)

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        module = built(self.student, self.teacher, seed, networks)
        asked, done = written(module, self.task, seed)
        ids, start = joined(module, asked, done), self.task.digits + 2
        longest = ids.shape[1] - start
        law = self.teacher.logprobs if isinstance(self.teacher, GrammarTeacher) else network_law(module.teacher.model)  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(seed)
        own = correct(ids, self.task.digits)
        gains: Curve = []
        figures = {"student_accuracy": float(own.double().mean())}

        def finished(length: int) -> Tensor:  # a completion that had ended by then stays what it is
            begun = ids[:, : start + length]
            return correct(continued(law, begun, longest - length + 2, generator, start), self.task.digits)

        alone = finished(0)
        figures["teacher_accuracy"] = float(alone.double().mean())
        for number, length in enumerate(self.prefixes, 1):
            right = finished(length)
            accuracy = float(right.double().mean())
            gains.append((length, accuracy - figures["student_accuracy"]))
            figures |= {f"gain_{length}": gains[-1][1], f"from_prefix_{length}": accuracy}
            figures[f"mcnemar_{length}"] = mcnemar(alone, right)
            tick(number / len(self.prefixes))
        rises = [after - before for (_, before), (_, after) in pairwise(gains)]
        figures["largest_rise"] = max(rises, default=0.0)
        return Record(figures, {"gain": gains})


def mcnemar(alone: Tensor, later: Tensor) -> float:
    """Two-sided exact p-value of McNemar's test: rows that changed, against a fair coin.

    >>> mcnemar(torch.tensor([True] * 8), torch.tensor([False] * 8))
    0.0078125
    """
    lost, won = int((alone & ~later).sum()), int((~alone & later).sum())
    total, least = lost + won, min(lost, won)
    tail = sum(math.comb(total, i) for i in range(least + 1))
    return min(1.0, 2.0 * tail / 2.0**total)


class Signal(Arm):
    """What a teacher's mean reward says about whole completions, and how much the gradients of completions cancel.

    ``r(y) = mean_t log q(y_t) - log p(y_t)`` on the student's own completions: the area under the curve with which it
    tells right from wrong ones; and ``norm of sum_i g_i / sum_i norm of g_i`` over the gradients of single completions.

    Args:
        student: name of a network.
        teacher: a network or a law.
        task: the prompts.
    """

    GRADIENTS = 32

    def __init__(self, student: str, teacher: str | GrammarTeacher, task: DigitSum = DigitSum()) -> None:
        self.student, self.teacher, self.task = student, teacher, task
        self.needs = (student, teacher) if isinstance(teacher, str) else (student,)

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        module = built(self.student, self.teacher, seed, networks)
        asked, done = written(module, self.task, seed)
        rollout = module.join(asked, done)
        right = correct(rollout.text.ids, self.task.digits)
        with torch.no_grad():
            found = module.score(rollout, module.objective).stats.values["k1"]
        signal = torch.zeros(rollout.mask.shape).masked_scatter(rollout.mask, -found.float())
        reward = signal.sum(-1) / rollout.mask.sum(-1)
        tick(0.5)
        total, size = torch.zeros(()), 0.0
        for one in gradients(module, module.objective, rollout, self.GRADIENTS):
            total, size = total + one, size + float(one.norm())
        figures = {"auroc": auroc(reward, right), "accuracy": float(right.double().mean())}
        return Record(figures | {"cancellation": float(total.norm()) / size if size else 0.0})


class Noise(Arm):
    """Trace of the covariance of a gradient over the student's own completions, one completion a gradient.

    Args:
        student: name of a network.
        teacher: a network or a law.
        objective: what is descended; it learns no critic.
        task: the prompts.
        completions: how many.
    """

    def __init__(
        self,
        student: str,
        teacher: str | GrammarTeacher,
        objective: Objective,
        task: DigitSum = DigitSum(),
        completions: int = 256,
    ) -> None:
        self.student, self.teacher, self.task = student, teacher, task
        self.objective, self.completions = objective, completions
        self.needs = (student, teacher) if isinstance(teacher, str) else (student,)
        self.work = 0.01 * completions

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        module = built(self.student, self.teacher, seed, networks)
        rollout = module.join(*written(module, self.task, seed))
        total, squares, count = torch.zeros((), dtype=torch.float64), 0.0, 0
        for one in gradients(module, self.objective, rollout, self.completions):
            total, squares, count = total + one.double(), squares + float(one.double().square().sum()), count + 1
            tick(count / self.completions)
        trace = (squares - float(total.square().sum()) / count) / (count - 1)
        with torch.no_grad():
            cost = module.score(rollout, Objective(ReverseKL())).stats.values["reverse_kl"]
        return Record({"variance": trace, "reverse_kl": float(cost.mean())})


def gradients(module: OPDModule, objective: Objective, rollout: Rollout, most: int) -> Iterator[Tensor]:
    """The gradient of one completion after the other, summed over its tokens, in all weights."""
    for i in range(min(most, len(rollout))):
        module.zero_grad()
        row = replace(rollout.select(torch.tensor([i])), scale=(1.0,))
        module.score(row, objective).loss.backward()
        yield torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def auroc(score: Tensor, right: Tensor) -> float:
    """Chance that a right row scores higher than a wrong one; ties count half.

    >>> auroc(torch.tensor([0.1, 0.4, 0.3]), torch.tensor([False, True, True]))
    1.0
    """
    gap = score[right][:, None] - score[~right][None]
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
