"""Teachers that follow the student: a moving average, a periodic copy, the student itself.

Each begins as the student, so each needs a context that the student does not see (`data.teacher_template`). What they aim at
moves with the student: their updates happen after the optimizer step, before anything is evaluated, saved or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning import parallel
from opd_lightning.models.distributions import evaluating
from opd_lightning.models.teachers.base import StartTeacher, Teacher

__all__ = ["EMATeacher", "LiveTeacher", "PeriodicTeacher"]


class FollowingTeacher(StartTeacher):
    """A copy of the student whose trained weights are pulled towards it: ``teacher += rate * (student - teacher)``.

    The averages are kept in float32 where the weights are narrower: a small rate would vanish in their rounding.

    Args:
        rate: of the pull, in (0, 1].
        every: optimizer steps between two pulls.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, rate: float, every: int) -> None:
        super().__init__()
        if not 0.0 < rate <= 1.0 or every < 1:
            raise ValueError(
                f"{type(self).__name__}(rate={rate}, every={every}): the rate must lie in (0, 1], every must be at least 1"
            )
        self.rate, self.every = rate, every
        self.averages: dict[str, Tensor] = {}
        self.step = 0
        self._loaded: dict[str, Any] | None = None

    def build(self, student: nn.Module, share: bool = True) -> None:
        if self.model is not None:
            return
        super().build(student, share)
        self._names = [name for name, p in student.named_parameters() if p.requires_grad]

    def _weights(self) -> dict[str, Tensor]:
        """The averages by name: the copy's own weights where those are wide enough. Read late, because sharding and moving
        to a device replace them.
        """
        assert self.model is not None, "OPDModule.configure_model builds it"
        parallel.reshard(self.model)
        own = {name: p.detach() for name, p in self.model.named_parameters()}
        weights = {}
        for name in self._names:
            narrow = own[name].dtype.itemsize < 4
            wide = torch.float32 if narrow else own[name].dtype
            weights[name] = self.averages.get(name, own[name]).to(own[name].device, wide)
            if narrow:
                self.averages[name] = weights[name]
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._take(weights, state["weights"])
        return weights

    def _take(self, weights: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
        if differing := sorted(weights.keys() ^ loaded.keys()):
            raise ValueError(
                f"the checkpoint's {type(self).__name__} belongs to another student: {len(differing)} tensors differ (first: "
                f"{differing[0]}). Compare model.student in its config with this run's."
            )
        for name, tensor in weights.items():
            parallel.put_whole(tensor, loaded[name])
        self._publish(weights)

    @torch.no_grad()
    def _publish(self, weights: dict[str, Tensor]) -> None:
        assert self.model is not None
        for name, p in self.model.named_parameters():
            if name in self.averages:
                p.copy_(weights[name])

    @torch.no_grad()
    def after_step(self, student: nn.Module, step: int) -> None:
        if step == self.step:  # a micro-batch that closed no optimizer step; a new fit counts from 0 again
            return
        self.step = step
        if step % self.every:
            return
        weights = self._weights()
        with parallel.unwrapped(student):
            theirs = dict(student.named_parameters())
            for name, average in weights.items():
                average.lerp_(theirs[name].detach().to(average.dtype), self.rate)
        self._publish(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": {n: parallel.whole(w) for n, w in self._weights().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: if the state belongs to another student.
        """
        self._loaded, self.step = state, state["step"]
        if self.model is not None:
            self._weights()

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        if self._loaded is not None:  # a checkpoint that was read before the model was built
            self._weights()
        with super().speaking(student) as model:
            yield model


class EMATeacher(FollowingTeacher):
    """An exponential moving average of the student: ``teacher = (1 - rate) teacher + rate student``, in every checkpoint.

    Published rates: 0.05 (SDPO, arXiv 2601.20802), 0.01 (SDFT, arXiv 2601.19897, in its released code). A LoRA student's base
    is shared, so only the adapters are kept twice.

    Args:
        rate: weight of the student in every update, in (0, 1]; others call 1 - rate the decay.
        every: optimizer steps between two updates.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, rate: float = 0.05, every: int = 1) -> None:
        super().__init__(rate, every)

    @property
    def moving(self) -> str:
        return f"the teacher is a moving average of the student (rate {self.rate:g} every {self.every} steps): its aim moves"


class PeriodicTeacher(FollowingTeacher):
    """A copy of the student, made anew every some optimizer steps (OPSDC, arXiv 2603.05433, every 50). In every checkpoint.

    Args:
        every: optimizer steps between two copies.

    Raises:
        ValueError: if every is below 1.
    """

    def __init__(self, every: int = 50) -> None:
        super().__init__(1.0, every)

    @property
    def moving(self) -> str:
        return f"the teacher is copied from the student every {self.every} steps: its aim moves in jumps"


class LiveTeacher(Teacher):
    """The student itself, in eval mode and without gradient: it answers from another context with the weights of this step.

    Nothing holds it in place: OPCD (arXiv 2602.12275) reports 18.8 against 53.9 for a frozen one on one task. Train it beside a
    divergence to `model.reference`.
    """

    starts_as_student = True

    @property
    def moving(self) -> str:
        return "the teacher is the student itself: its aim moves with every step and nothing holds it in place"

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        with evaluating(student):
            yield student
