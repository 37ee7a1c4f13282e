"""Does this teacher, in this context, teach this student anything, and to where? Read off the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd_lightning.data.contexts import Context
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.data.templates import AutoTemplate, ChatTemplate, Template
from opd_lightning.models import LiveTeacher, PeriodicTeacher
from opd_lightning.objectives import ForwardKL, NoCorrection, Objective, TokenRatio
from opd_lightning.objectives.defects import Defect, DegenerateObjective
from opd_lightning.objectives.partial import refuse_beyond
from opd_lightning.objectives.validate import DeclaredTarget
from opd_lightning.sources import Source


def declared_with(objective: Objective, teacher: Any) -> DeclaredTarget:
    """What an objective descends, with the teacher's own movement among its biases."""
    target = objective.declared_target
    if not objective.needs_teacher or not teacher.moving:
        return target
    return replace(target, biases=(*target.biases, f"not the gradient of a fixed scalar: {teacher.moving}"))


def refuse_unfit_teacher(module: Any, objective: Objective, source: Source, data: PromptDataModule | None) -> None:
    """Check a teacher against what is compared with it, who writes and what it is told.

    Raises:
        ValueError: for an objective that needs more than the teacher tells, or a source that lets one write that cannot.
        DegenerateObjective: for a teacher that is the student and is told nothing more, where nothing else is descended.
    """
    teacher = module.teacher
    if teacher.known is not None:
        refuse_beyond(objective, teacher.known)
    if objective.needs_reference and module.reference.known is not None:
        raise ValueError("model.reference must tell its whole law: a ServerTeacher cannot be one")
    if source.teacher_writes and not teacher.writes:
        raise ValueError(
            f"rollout.source lets the teacher write, but {type(teacher).__name__} only scores: use StudentSource or "
            "DatasetSource, or another model.teacher"
        )
    _refuse_two_vocabularies(module)
    parts = [part for part, _ in module.objective.flat()]
    if data is None or data.teacher_template is not None or not teacher.starts_as_student or module.phases:
        return
    if all(p.needs_teacher and not p.needs_reference and not p.allow_degenerate for p in parts) and not source.others_write:
        raise DegenerateObjective(
            str(
                Defect(
                    f"{type(teacher).__name__} begins as the student and is told nothing that the student is not told",
                    "KL(student ‖ student) = 0, and so is its gradient, at the first step and at every later one",
                    "data.teacher_template: a context such as SystemPrompt or ReferenceSolution, or another model.teacher",
                )
            )
        )


def _refuse_two_vocabularies(module: Any) -> None:
    """A teacher with another tokenizer can be compared in one way only.

    Raises:
        DegenerateObjective: for an objective that takes its tokens for the student's.
        ValueError: where it stands for a model of the student's vocabulary.
    """
    for name, model in [("model.reference", module.reference), *_members(module.teacher)]:
        if model.translation is not None:
            raise ValueError(
                f"{name} is a {type(model).__name__}: a model with another tokenizer can only be model.teacher itself"
            )
    if module.teacher.translation is None:
        return
    for objective in (module.objective, *(phase.objective for phase in module.phases)):
        for part, _ in objective.flat():
            if part.needs_teacher and not part.support.crosses:
                raise DegenerateObjective(
                    str(
                        Defect(
                            f"{type(module.teacher).__name__} has a vocabulary of its own, and {part.support.title} would take "
                            "its token ids for the student's",
                            "q(a) of the student's token a does not exist where the teacher has no token a",
                            "support: MatchedVocab, with an exact divergence and credit Immediate (or support: WrittenToken)",
                        )
                    )
                )


def _members(teacher: Any) -> list[tuple[str, Any]]:
    """The teachers inside a teacher, by their keys."""
    return [(f"model.teacher.{name}", leaf) for name, leaf in teacher.leaves().items() if name]


def refuse_unfit_engine(objective: Objective) -> str:
    """Check an objective against an engine whose log-probabilities are not the trainer's own.

    Returns:
        What should be written instead, in a sentence; empty if nothing.

    Raises:
        DegenerateObjective: for sampled tokens that are taken for the trainer's own.
    """
    sampled = [part for part, rows in objective.flat() if part.needs_sampler and rows != "others"]
    if any(isinstance(part.correction, NoCorrection) and not part.allow_degenerate for part in sampled):
        raise DegenerateObjective(
            str(
                Defect(
                    "NoCorrection takes the engine's tokens for the trainer's own, and the two compute different laws",
                    "E_{y ~ engine} A grad log p(y) != E_{y ~ p} A grad log p(y)",
                    "correction: TruncatedRatio (or TokenRatio, ICEPop), or rollout.sampler: NativeSampler",
                )
            )
        )
    if any(isinstance(part.correction, TokenRatio) for part in sampled):
        return (
            "another engine writes, and where kernels or precisions differ single ratios become large: truncate them with "
            "`objective.correction: TruncatedRatio`"
        )
    return ""


def refuse_incomparable(teacher: Any, who: str) -> None:
    """Refuse a teacher whose laws cannot be laid beside the student's, entry by entry.

    Args:
        teacher: who is asked.
        who: needs whole laws, for the message.

    Raises:
        ValueError: for one with a tokenizer of its own, or one that tells only its likeliest tokens.
    """
    for leaf in teacher.leaves().values():
        if leaf.known is not None or leaf.translation is not None:
            why = (
                "has a tokenizer of its own"
                if leaf.translation is not None
                else f"tells its {leaf.known} likeliest tokens alone"
            )
            raise ValueError(f"{who} compares whole laws token by token, but {type(leaf).__name__} {why}: leave it out")


def remarks(module: Any, data: PromptDataModule | None) -> list[str]:
    """What is known to go wrong with this teacher, context and objective, a sentence each."""
    teacher, out = module.teacher, []
    parts = [part for part, _ in module.objective.flat()]
    dense = [p for p in parts if p.needs_teacher]
    kinds = tuple(type(leaf) for leaf in teacher.leaves().values())
    if any(isinstance(p.divergence, ForwardKL) for p in dense) and any(k in (LiveTeacher, PeriodicTeacher) for k in kinds):
        out.append(
            "forward KL to a teacher that jumps with the student saw-tooths (OPSDC, arXiv 2603.05433, reports a collapse): use "
            "ReverseKL, or EMATeacher"
        )
    if LiveTeacher in kinds and dense and not any(p.needs_reference for p in parts):
        out.append(
            "nothing holds a live teacher in place: add a term towards model.reference, or use EMATeacher, TrustRegionTeacher "
            "or a frozen one"
        )
    told = data.teacher_template if data is not None else None
    if isinstance(told, Context) and told.instance and dense:
        out.append(
            f"{type(told).__name__} tells the teacher what differs from row to row: the student, who never sees it, can at "
            "best reach the mean over what could have been told, at a divergence above 0, and may learn to cite it"
        )
    frame = told.template if isinstance(told, Context) else told
    if data is not None and frame is not None and (difference := _difference(data.template, frame)):
        out.append(f"data.template and data.teacher_template differ in more than what the teacher is told: {difference}")
    return out


def _difference(student: Template, teacher: Template) -> str:
    """How two templates frame the same prompt differently; empty if they do not."""
    chat = (AutoTemplate, ChatTemplate)
    if type(student) is not type(teacher) and not (isinstance(student, chat) and isinstance(teacher, chat)):
        return f"{type(student).__name__} against {type(teacher).__name__}"
    ours, theirs = (t.options if isinstance(t, ChatTemplate) else {} for t in (student, teacher))
    return f"options {ours} against {theirs}" if ours != theirs else ""
