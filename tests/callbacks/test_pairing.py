"""Teachers that teach nothing, move, or cannot write are refused or declared when the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest

from opd_lightning.callbacks import ColdStart, RolloutRefresh
from opd_lightning.callbacks.pairing import remarks
from opd_lightning.data import AnswerOnly, ChatTemplate, Instruction, PlainTemplate
from opd_lightning.models import (
    AdapterOffTeacher,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    LiveTeacher,
    LoRA,
    PeriodicTeacher,
    StartTeacher,
    Student,
    Teacher,
    TrustRegionTeacher,
)
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    Extrapolation,
    ForwardKL,
    Objective,
    ReverseKL,
    SampledToken,
    Term,
    Terms,
    WrittenToken,
)
from opd_lightning.objectives.defects import DegenerateObjective
from opd_lightning.sources import DatasetSource, MixtureSource, StudentSource, TeacherSource
from tests.helpers import tiny_data

BIG = "zoo/addition/teacher"
SELVES: list[Teacher] = [
    AdapterOffTeacher(),
    StartTeacher(),
    EMATeacher(),
    PeriodicTeacher(),
    LiveTeacher(),
    TrustRegionTeacher(),
]


def module_of(teacher: Teacher, objective: Any = None) -> OPDModule:
    return OPDModule(Student("zoo/addition/student", lora=LoRA(r=2)), teacher, objective or Objective(ReverseKL()))


@pytest.mark.parametrize("teacher", SELVES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("support", [None, SampledToken()], ids=["full", "sampled"])
def test_a_self_teacher_in_the_students_context_is_refused(teacher: Teacher, support: Any) -> None:
    objective = Objective(ReverseKL(), support) if support else Objective(ReverseKL())
    with pytest.raises(DegenerateObjective, match=r"KL\(student ‖ student\) = 0"):
        RolloutRefresh().declare(module_of(teacher, objective), tiny_data())
    RolloutRefresh().declare(module_of(teacher, objective), tiny_data(teacher_template=Instruction("Be brief.")))


@pytest.mark.parametrize(
    ("teacher", "objective", "source"),
    [
        (FrozenTeacher(BIG), Objective(ReverseKL()), StudentSource()),
        (StartTeacher(), Objective(ReverseKL(), target=Extrapolation(1.25)), StudentSource()),  # the reference may differ
        (StartTeacher(), Objective(ReverseKL(), allow_degenerate=True), StudentSource()),
        (EnsembleTeacher([StartTeacher(), FrozenTeacher(BIG)]), Objective(ReverseKL()), StudentSource()),
        (
            StartTeacher(),  # holds a student near its start that learns from given text
            Terms([Term(Objective(ReverseKL())), Term(Objective(ForwardKL(), WrittenToken()))]),
            DatasetSource(),
        ),
    ],
)
def test_what_does_teach_is_accepted(teacher: Teacher, objective: Any, source: Any) -> None:
    assert RolloutRefresh(source).declare(module_of(teacher, objective), tiny_data())


def test_a_cold_start_moves_the_student_away_from_its_start() -> None:
    module = module_of(StartTeacher())
    ColdStart(steps=2, source=DatasetSource()).announce(module)
    assert len(RolloutRefresh().declare(module, tiny_data())) == 2


@pytest.mark.parametrize("source", [TeacherSource(), MixtureSource(StudentSource(), TeacherSource())])
def test_a_teacher_that_only_scores_cannot_be_the_writer(source: Any) -> None:
    teacher = EnsembleTeacher([FrozenTeacher(BIG), FrozenTeacher("zoo/addition/student")])
    with pytest.raises(ValueError, match="EnsembleTeacher only scores"):
        RolloutRefresh(source).declare(module_of(teacher), tiny_data())


def test_movement_is_declared_as_a_bias() -> None:
    told = tiny_data(teacher_template=Instruction("Be brief."))
    for teacher, words in (
        (EMATeacher(0.1), "rate 0.1"),
        (PeriodicTeacher(7), "every 7 steps"),
        (LiveTeacher(), "nothing holds"),
    ):
        line = RolloutRefresh().declare(module_of(teacher), told)[-1]
        assert "not the gradient of a fixed scalar" in line and words in line
    assert "fixed scalar" not in RolloutRefresh().declare(module_of(StartTeacher()), told)[-1]
    likelihood = Objective(ForwardKL(), WrittenToken())  # does not ask the teacher, so its movement does not matter
    assert "fixed scalar" not in RolloutRefresh(DatasetSource()).declare(module_of(EMATeacher(), likelihood), told)[-1]


@pytest.mark.parametrize(
    ("teacher", "objective", "data", "words"),
    [
        (PeriodicTeacher(), Objective(ForwardKL()), {"teacher_template": Instruction("x")}, ["saw-tooths"]),
        (LiveTeacher(), Objective(ForwardKL()), {"teacher_template": Instruction("x")}, ["saw-tooths", "nothing holds"]),
        (LiveTeacher(), Objective(ReverseKL()), {"teacher_template": Instruction("x")}, ["nothing holds"]),
        (StartTeacher(), Objective(ReverseKL()), {"teacher_template": AnswerOnly()}, ["from row to row"]),
        (
            FrozenTeacher(BIG),
            Objective(ReverseKL()),
            {"template": ChatTemplate(), "teacher_template": PlainTemplate()},
            ["differ"],
        ),
        (
            FrozenTeacher(BIG),
            Objective(ReverseKL()),
            {"template": ChatTemplate(), "teacher_template": ChatTemplate(options={"enable_thinking": False})},
            ["enable_thinking"],
        ),
        (EMATeacher(), Objective(ForwardKL()), {"teacher_template": Instruction("x")}, []),
        (FrozenTeacher(BIG), Objective(ForwardKL()), {}, []),
        (FrozenTeacher(BIG), Objective(ReverseKL()), {"template": ChatTemplate(), "teacher_template": ChatTemplate("x")}, []),
    ],
)
def test_known_troubles_are_named_and_no_others(
    teacher: Teacher, objective: Any, data: dict[str, Any], words: list[str]
) -> None:
    found = remarks(module_of(teacher, objective), tiny_data(**data))
    assert len(found) == len(words), found
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence
