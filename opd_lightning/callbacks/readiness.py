"""Is the student near enough to its teacher to learn from its own text? What a cold start looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch

from opd_lightning import parallel
from opd_lightning.callbacks.writing import RunWriters
from opd_lightning.configurable import Configurable
from opd_lightning.models.distributions import evaluating
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler

REVERSE_KL = Objective(ReverseKL())
NEAR = 0.1
"""Share of a student's texts that must be near its teacher for plain distillation to begin from; the doctor asks the same."""


@dataclass(frozen=True)
class Standing:
    """Where the student stands.

    Attributes:
        mass: its probability on the shared top-k tokens, mean over the tokens that it writes.
        reverse_kl: KL(student ‖ teacher), nats per token there.
        ends: probability of the teacher over that of the student where the student ended, geometric mean, at most 1; 0 if it
            never ended.
        truncated: share of its completions that the length limit cut.
        nearest_kl: the reverse KL of its completions that are nearest; see `nearest`.
    """

    mass: float
    reverse_kl: float
    ends: float
    truncated: float
    nearest_kl: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        near = f"overlap mass {self.mass:.3f}, reverse KL {self.reverse_kl:.3f} (nearest texts {self.nearest_kl:.3f})"
        return f"{near}, share of the end {self.ends:.2f}, truncated {self.truncated:.0%}"


class Readiness(Configurable):
    """Thresholds between which a cold start begins and ends, with hysteresis.

    The student writes behind a few training prompts, always the same; both models score it. The phase is entered if a figure
    is worse than the first of its two numbers, and left when all are better than the second, several times in a row.

    Args:
        mass: overlap mass of the student. Below 0.8 a pair of another pattern had not learned after 120 steps, above 0.95
            every seed did, in a toy after "Rethinking On-Policy Distillation" (arXiv 2604.13016, section 5.1), whose own runs
            that succeed lie at 0.97.
        reverse_kl: nats per token. The same toy: 3.3 before, 0.46 behind a sufficient cold start.
        ends: probability of the teacher over that of the student, where the student ended.
        truncated: share of completions cut by the length limit.
        near: where this share of the completions is within the first number of ``reverse_kl``, mass and divergence ask for no
            cold start: training makes such texts more frequent (`opd reproduce D1`). 0 does without this rule.
        patience: looks in a row at which all must hold.
        every_n_steps: optimizer steps between two looks; a refresh must begin there (a multiple of rollout.every_n_steps).
        prompts: how many, over all devices, one completion each.
        k: size of the top-k sets; 0 takes 16, or a fifth of a small vocabulary.

    Raises:
        ValueError: for numbers out of range, or a pair whose second is not the stricter.
    """

    def __init__(
        self,
        mass: tuple[float, float] = (0.8, 0.95),
        reverse_kl: tuple[float, float] = (1.25, 0.5),
        ends: tuple[float, float] = (0.1, 0.5),
        truncated: tuple[float, float] = (0.5, 0.1),
        near: float = NEAR,
        patience: int = 2,
        every_n_steps: int = 10,
        prompts: int = 32,
        k: int = 0,
    ) -> None:
        if min(patience, every_n_steps, prompts) < 1 or k < 0:
            raise ValueError(
                f"Readiness(patience={patience}, every_n_steps={every_n_steps}, prompts={prompts}, k={k}): the first three at "
                "least 1, k at least 0"
            )
        if not 0.0 <= near <= 1.0:
            raise ValueError(f"Readiness(near={near}): a share of the completions, in [0, 1]")
        for name, (enter, leave), rises in (
            ("mass", mass, True),
            ("reverse_kl", reverse_kl, False),
            ("ends", ends, True),
            ("truncated", truncated, False),
        ):
            if (leave < enter) if rises else (leave > enter):
                raise ValueError(
                    f"Readiness({name}={[enter, leave]}): the second number, at which the cold start is left, must be the "
                    f"{'larger' if rises else 'smaller'} one"
                )
        self.limits = {"mass": mass, "reverse_kl": reverse_kl, "ends": ends, "truncated": truncated}
        self.near, self.patience, self.every_n_steps, self.prompts, self.k = near, patience, every_n_steps, prompts, k

    def lacking(self, found: Standing, entering: bool) -> list[str]:
        """What is not good enough, a phrase each.

        >>> Readiness().lacking(Standing(0.7, 1.3, 0.9, 0.0, nearest_kl=0.2), entering=True)
        []
        >>> Readiness().lacking(Standing(0.9, 0.3, 0.9, 0.0, nearest_kl=0.2), entering=False)
        ['overlap mass 0.900 is below 0.95']
        """
        which, out = (0 if entering else 1), []
        begun = entering and self.near > 0.0 and found.nearest_kl <= self.limits["reverse_kl"][0]
        excused = ("mass", "reverse_kl") if begun else ()
        for name, title in (("mass", "overlap mass"), ("ends", "the teacher's share of the student's end")):
            if (value := getattr(found, name)) < (limit := self.limits[name][which]) and name not in excused:
                out.append(f"{title} {value:.3f} is below {limit:g}")
        for name, title in (("reverse_kl", "reverse KL"), ("truncated", "share of truncated completions")):
            if (value := getattr(found, name)) > (limit := self.limits[name][which]) and name not in excused:
                out.append(f"{title} {value:.3f} is above {limit:g}")
        return out

    def measure(self, trainer: pl.Trainer, pl_module: Any, sampler: NativeSampler, seed: int) -> Standing:
        """Have the student write, and both models score it. All ranks must call it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        world, rank, vocabulary = parallel.world_size(), parallel.rank(), pl_module.vocabulary
        everything, count = data.train_prompts, min(self.prompts, len(data.train_prompts))
        chosen = [everything[i * len(everything) // count] for i in range(count)]
        places = [place * world + rank for place in range(-(-count // world))]  # equally many on every rank
        prompts = [replace(chosen[i], row=i) if i < count else replace(chosen[0], row=-1) for i in places]
        k = self.k or max(1, min(16, vocabulary.size // 5))
        each: list[float] = []
        sums = torch.zeros(7, dtype=torch.float64)
        with torch.no_grad(), evaluating(pl_module.student), trainer.precision_plugin.forward_context():
            written = RunWriters(trainer, pl_module, sampler, seed, "readiness").student(prompts)
            told = data.inform(prompts, written, 1)
            size = data.micro_batch_size or 16
            for start in range(0, len(prompts), size):
                rollout = pl_module.join(told[start : start + size], written[start : start + size])
                counted = (rollout.row >= 0)[:, None].expand_as(rollout.mask)[rollout.mask]
                values = pl_module.score(rollout.to(pl_module.device), REVERSE_KL, k).stats.values
                mass, divergence, k1 = (values[n].cpu().double() for n in ("student_overlap_mass", "reverse_kl", "k1"))
                closing = torch.isin(rollout.text.targets[rollout.mask], torch.tensor(vocabulary.eos_ids)) & counted
                real = rollout.row >= 0
                texts = divergence.split(rollout.mask.sum(-1).tolist())
                each += [float(text.mean()) for text, own in zip(texts, real, strict=True) if own and len(text)]
                found = (mass[counted], divergence[counted], counted, -k1[closing], closing, real & ~rollout.ended, real)
                sums += torch.stack([value.sum().double() for value in found])
        mass, divergence, tokens, ends, closed, cut, rows = parallel.sum_over_ranks(sums.tolist())
        end = math.exp(min(ends / closed, 0.0)) if closed else 0.0
        near = nearest([mean for some in parallel.gather_objects(each) for mean in some], self.near)
        return Standing(mass / tokens, divergence / tokens, end, cut / rows, near)


def nearest(means: Sequence[float], share: float = NEAR) -> float:
    """The largest among that share of completions whose reverse KL, nats per token, is smallest; of one at least.

    >>> nearest([2.0, 0.5, 4.0])
    0.5
    """
    return sorted(means)[max(math.ceil(len(means) * share), 1) - 1]
