"""Several objectives at once: on-policy and off-policy, distillation and likelihood, a leash to a reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.objectives.objective import Objective
from opd_lightning.objectives.rows import Extras, measure
from opd_lightning.objectives.validate import DeclaredTarget
from opd_lightning.types import NOT_A_STUDENT, ObjectiveOutput, Rollout, TokenLaws

__all__ = ["Term", "Terms"]

Rows = Literal["all", "student", "others"]


class Term(Configurable):
    """One objective among several.

    Args:
        objective: what it descends.
        weight: factor at the first step; at least 0.
        final_weight: factor at the last step, reached linearly; null keeps ``weight``.
        rows: on whose completions: ``all``, the ``student``'s, or ``others``' (teacher, data set). Rows that it leaves out
            do not count in its denominator.

    Raises:
        ValueError: for negative weights or unknown rows.
    """

    def __init__(
        self, objective: Objective, weight: float = 1.0, final_weight: float | None = None, rows: Rows = "all"
    ) -> None:
        last = weight if final_weight is None else final_weight
        if weight < 0.0 or last < 0.0 or weight + last == 0.0:
            raise ValueError(f"Term(weight={weight}, final_weight={final_weight}): at least 0, and not both 0")
        if rows not in get_args(Rows):
            raise ValueError(f"Term(rows={rows!r}): allowed are {', '.join(get_args(Rows))}")
        self.objective, self.weight, self.final_weight, self.rows = objective, weight, last, rows

    def weight_at(self, progress: float) -> float:
        return self.weight + (self.final_weight - self.weight) * progress

    def selected(self, rollout: Rollout) -> Tensor | None:
        """(B,) rows that it learns from; None for all."""
        if self.rows == "all":
            return None
        own = rollout.policy_step != NOT_A_STUDENT
        return own if self.rows == "student" else ~own


class Terms(Objective):
    """A weighted sum of objectives, each with its own rows and its own denominator.

    Statistics and logged divergences are those of the rollouts as a whole.

    Args:
        terms: at least one.
        allow_degenerate: train a combination that is refused for a defect, to study it.

    Raises:
        ValueError: for an empty list.
    """

    def __init__(self, terms: list[Term], allow_degenerate: bool = False) -> None:
        if not terms or any(isinstance(t.objective, Terms) for t in terms):
            raise ValueError("Terms(terms=...): give at least one term, and no Terms inside Terms")
        if controls := [t.objective.control for t in terms if t.objective.control]:
            raise ValueError(f"Terms(terms=...): {controls[0]!r} is a control; it stands alone (model.objective)")
        self.terms, self.allow_degenerate = terms, allow_degenerate
        self.temperature = terms[0].objective.temperature  # what on-policy sampling is compared with

    def flat(self) -> list[tuple[Objective, str]]:
        return [(t.objective, t.rows) for t in self.terms]

    @cached_property
    def declared_target(self) -> DeclaredTarget:
        targets = [t.objective.declared_target for t in self.terms]
        return DeclaredTarget(
            name=" + ".join(f"{_factor(t)}{d.name}{_rows(t)}" for t, d in zip(self.terms, targets, strict=True)),
            parts=tuple(dict.fromkeys(p for d in targets for p in d.parts)),
            biases=tuple(dict.fromkeys(b for d in targets for b in d.biases)),
            defect=next((d.defect for d in targets if d.defect), None),
            formula=next((d.formula for d in targets if d.formula), None),
            remedy=next((d.remedy for d in targets if d.remedy), None),
        )

    @property
    def needs_teacher(self) -> bool:
        return any(t.objective.needs_teacher for t in self.terms)

    @property
    def needs_reference(self) -> bool:
        return any(t.objective.needs_reference for t in self.terms)

    @property
    def needs_critic(self) -> bool:
        return any(t.objective.needs_critic for t in self.terms)

    @property
    def needs_groups(self) -> bool:
        return any(t.objective.needs_groups for t in self.terms)

    @property
    def needs_sampler(self) -> bool:
        return any(t.objective.needs_sampler for t in self.terms)

    def denominators(self, rollout: Rollout) -> list[float]:
        return [t.objective.reduction.denominator(t.objective.counted(rollout, t.selected(rollout))) for t in self.terms]

    def __call__(
        self,
        student: TokenLaws,
        teacher: TokenLaws | None,
        rollout: Rollout,
        agreement_k: int = 0,
        extras: Extras = Extras(),
        rows: Tensor | None = None,
    ) -> ObjectiveOutput:
        objectives, selected = [t.objective for t in self.terms], [t.selected(rollout) for t in self.terms]
        sizes = [t.weight_at(extras.progress) for t in self.terms]
        own = [replace(rollout, scale=rollout.scale[i : i + 1]) for i in range(len(self.terms))]
        expected: list[Tensor | None] = []
        for objective, part, chosen, size in zip(objectives, own, selected, sizes, strict=True):
            objective.check(part, chosen)
            given = objective.expected_gradient(part, chosen)
            expected.append(given if given is None else given * size)
        tokens = rollout.text.targets[rollout.mask]
        extras = self.recorded(rollout, extras)
        found, stats = measure(objectives, student, teacher, tokens, agreement_k, extras, expected)
        past = extras.past.split(1) if extras.past is not None else [None] * len(own)
        outputs = [
            objective.conclude(parts, stats, part, chosen, student.vocab, replace(extras, past=before))
            for objective, parts, part, chosen, before in zip(objectives, found, own, selected, past, strict=True)
        ]
        kept = outputs[0].stats
        if errors := [
            w * o.stats.values["critic_loss"] for w, o in zip(sizes, outputs, strict=True) if "critic_loss" in o.stats.values
        ]:
            kept = replace(kept, values=kept.values | {"critic_loss": torch.stack(errors).sum(0)})
        return ObjectiveOutput(
            loss=torch.stack([w * o.loss for w, o in zip(sizes, outputs, strict=True)]).sum(),
            token_loss=torch.stack([w * o.token_loss for w, o in zip(sizes, outputs, strict=True)]).sum(0),
            stats=kept,
            advantages=_joined([o.advantages for o in outputs]),
        )


def _joined(found: list[Tensor | None]) -> Tensor | None:
    """Rows of all terms, zeros for those that have none; None if nobody has."""
    some = next((x for x in found if x is not None), None)
    return None if some is None else torch.cat([torch.zeros_like(some) if x is None else x for x in found])


def _factor(term: Term) -> str:
    if term.weight == term.final_weight:
        return "" if term.weight == 1.0 else f"{term.weight:g} x "
    return f"({term.weight:g} to {term.final_weight:g}) x "


def _rows(term: Term) -> str:
    return {"all": "", "student": " on the student's text", "others": " on other text"}[term.rows]
