"""What the student is compared with: a law made of the teacher's, and sometimes of a reference's or the student's own.

A target is always held fixed: no gradient flows into it, also where it holds the student's law. (`SkewReverseKL` and its kin,
whose mixtures are differentiated, are divergences.) All laws are log-probabilities (N, V), in nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable

__all__ = [
    "Extrapolation",
    "GeometricBridge",
    "Interpolation",
    "ReferenceLaw",
    "Skewed",
    "Target",
    "TeacherLaw",
    "TeacherTemperature",
    "UniformLaw",
]


class Target(Configurable, ABC):
    """The law at which the student aims, state by state.

    Attributes:
        title: what `declared_target` prints; empty for the teacher itself.
        needs_reference: True if `model.reference` must answer too.
        moves: True if the target holds the student's own law and so moves with it.
    """

    title: str = ""
    needs_reference: bool = False
    moves: bool = False

    @abstractmethod
    def law(
        self,
        student: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"],
        reference: Float[Tensor, "N V"] | None,
        progress: float,
    ) -> Float[Tensor, "N V"]:
        """The target's log-probabilities. ``progress`` is the share of the run that is done, in [0, 1]."""


class TeacherLaw(Target):
    """The teacher itself."""

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        return teacher


class TeacherTemperature(Target):
    """The teacher's law with its logits divided by a temperature; the student's are not.

    Args:
        temperature: greater than 0; below 1 sharpens the teacher.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, temperature: float) -> None:
        if temperature <= 0.0:
            raise ValueError(f"TeacherTemperature(temperature={temperature}): must be greater than 0")
        self.temperature = temperature
        self.title = f"the teacher at temperature {temperature:g}"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        return (teacher / self.temperature).log_softmax(-1)


class Skewed(Target):
    """``(1 - a) teacher + a student``, held fixed: an arithmetic bridge. The reverse KL to it is what DistiLLM-2 computes
    (arXiv 2503.07067), because its mixture is detached.

    Args:
        student_share: a, in [0, 1).

    Raises:
        ValueError: for a share outside [0, 1).
    """

    moves = True

    def __init__(self, student_share: float) -> None:
        self.student_share = _share("Skewed", student_share)
        self.title = f"{1 - student_share:g} teacher + {student_share:g} student, held fixed"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        if self.student_share == 0.0:
            return teacher
        return torch.logaddexp(teacher + math.log1p(-self.student_share), student.detach() + math.log(self.student_share))


class GeometricBridge(Target):
    """``teacher^(1 - a) student^a``, normalised and held fixed. The forward KL to it has the logit gradient of the Rényi
    divergence of order 1 - a.

    Args:
        student_share: a, in [0, 1).

    Raises:
        ValueError: for a share outside [0, 1).
    """

    moves = True

    def __init__(self, student_share: float) -> None:
        self.student_share = _share("GeometricBridge", student_share)
        self.title = f"the geometric bridge teacher^{1 - student_share:g} student^{student_share:g}, held fixed"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        return _bridge(student, teacher, self.student_share)


class Interpolation(Target):
    """TAID's path from the student to the teacher (arXiv 2501.16937): the geometric bridge whose teacher share grows.

    The logits are mixed, ``softmax((1 - t) student + t teacher)`` with the student's held fixed, which is `GeometricBridge`
    with a share of the student of 1 - t. Here t grows linearly over the run; the paper also speeds it up while the loss falls.

    Args:
        start: t at the first step, in [0, 1].
        end: t at the last step, in [0, 1].

    Raises:
        ValueError: unless 0 <= start <= end <= 1 and end > 0.
    """

    moves = True

    def __init__(self, start: float = 0.4, end: float = 1.0) -> None:
        if not 0.0 <= start <= end <= 1.0 or end == 0.0:
            raise ValueError(f"Interpolation(start={start}, end={end}): needs 0 <= start <= end <= 1 and end > 0")
        self.start, self.end = start, end
        self.title = f"an interpolation from the student towards the teacher ({start:g} to {end:g})"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        t = self.start + (self.end - self.start) * progress
        return _bridge(student, teacher, 1.0 - t)


class Extrapolation(Target):
    """``teacher^s reference^(1 - s)``, normalised: the optimum of rewarding ``s log(teacher / reference)`` under a KL leash to
    the reference (ExOPD, arXiv 2602.12125). s = 1 is the teacher; s > 1 goes past it.

    Args:
        strength: s, greater than 0.

    Raises:
        ValueError: for a strength that is not positive.
    """

    needs_reference = True

    def __init__(self, strength: float = 1.25) -> None:
        if strength <= 0.0:
            raise ValueError(f"Extrapolation(strength={strength}): must be greater than 0 (1 is the teacher itself)")
        self.strength = strength
        self.title = f"the extrapolation teacher^{strength:g} reference^{1 - strength:g}"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        assert reference is not None
        return (self.strength * teacher + (1.0 - self.strength) * reference).log_softmax(-1)


class ReferenceLaw(Target):
    """The reference model instead of the teacher: a leash that keeps the student near it."""

    title = "the reference model"
    needs_reference = True

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        assert reference is not None
        return reference


class UniformLaw(Target):
    """The uniform law. The reverse KL to it is ``log V - entropy``: an entropy bonus."""

    title = "the uniform law (an entropy bonus)"

    def law(self, student: Tensor, teacher: Tensor, reference: Tensor | None, progress: float) -> Tensor:
        return torch.full_like(teacher, -math.log(teacher.shape[-1]))


def _share(name: str, share: float) -> float:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{name}(student_share={share}): must lie in [0, 1); with 1 the student would aim at itself")
    return share


def _bridge(student: Tensor, teacher: Tensor, student_share: float) -> Tensor:
    if student_share == 0.0:
        return teacher
    return ((1.0 - student_share) * teacher + student_share * student.detach()).log_softmax(-1)
