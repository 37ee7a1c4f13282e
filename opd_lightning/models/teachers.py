"""Teachers: who answers on the student's states.

A teacher is a plain object, never a submodule of the LightningModule: so it has no entry in checkpoints, optimizers or DDP
buckets, and `train()` never reaches it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd_lightning.configurable import Configurable
from opd_lightning.models.distributions import DenseLaws, evaluating, head_of, laws_of, prove_head
from opd_lightning.models.loading import DTYPES, load_config, load_model, load_tokenizer
from opd_lightning.models.students import Student
from opd_lightning.types import Rendering

__all__ = ["AdapterOffTeacher", "FrozenTeacher", "StartTeacher", "Teacher", "TextTeacher"]


class Teacher(Configurable, ABC):
    """A source of next-token laws. Subclass it for your own: `speaking` is the one method that must be written.

    `build` is called once, after the student was built.

    Attributes:
        answers: False if there is no network to ask, only text.
    """

    answers: bool = True

    def check(self, student: Student) -> None:
        """Refuse a student that this teacher cannot teach, before any weight is loaded."""

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer; None if it is the student's by construction."""
        return None

    def rows(self) -> int | None:
        """Logit rows; None if they are the student's by construction."""
        return None

    def build(self, student: nn.Module) -> None:
        """Load weights. The default teacher has none of its own."""

    def own_model(self) -> nn.Module | None:
        """The teacher's own network, to be moved to a device or sharded; None if it shares the student's weights."""
        return None

    @abstractmethod
    def speaking(self, student: nn.Module) -> Any:
        """Context manager that yields the network in the teacher's state: eval mode, adapters off, ..."""

    @torch.no_grad()
    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> DenseLaws:
        """Laws at the completion tokens; no gradient."""
        with self.speaking(student) as model:
            hidden = laws_of(model, text, vocab).hidden

        def head(states: Tensor) -> Tensor:  # runs later, when the student may be itself again
            with torch.no_grad(), self.speaking(student) as model:
                return head_of(model, vocab)(states)

        return DenseLaws(hidden, head, vocab)


class FrozenTeacher(Teacher):
    """A network of its own that never changes.

    Args:
        path: a hub name, a folder, a ``.gguf`` file, ``zoo/<task>/<model>``, or ``package:<module>/<file>``.
        dtype: of the weights.

    Raises:
        ValueError: for an unknown dtype.
    """

    def __init__(self, path: str, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"teacher.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
        self.path, self.dtype = path, dtype
        self.model: nn.Module | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    def rows(self) -> int:
        return int(load_config(self.path).get_text_config().vocab_size)

    def build(self, student: nn.Module) -> None:
        if self.model is None:
            self.model = load_model(self.path, self.dtype).eval().requires_grad_(False)
            prove_head(self.model)

    def own_model(self) -> nn.Module | None:
        return self.model

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        if self.model is None:
            raise RuntimeError("the teacher was not built: OPDModule.configure_model builds it")
        yield self.model


class StartTeacher(Teacher):
    """The student as it was before the first step: a frozen copy of its initial weights. A resumed run has the same one."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def build(self, student: nn.Module) -> None:
        if self.model is None:
            self.model = copy.deepcopy(student).eval().requires_grad_(False)

    def own_model(self) -> nn.Module | None:
        return self.model

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        assert self.model is not None, "OPDModule.configure_model builds it"
        yield self.model


class AdapterOffTeacher(Teacher):
    """The student's own network with its LoRA adapter switched off: one copy of the weights serves both.

    It teaches something new only from a context that the student does not see: give `data.teacher_template`.
    """

    def check(self, student: Student) -> None:
        if student.lora is None:
            raise ValueError(
                "AdapterOffTeacher is the student without its adapter, but the student has none: set `model.student.lora: {}`, "
                "or use FrozenTeacher"
            )

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        if not isinstance(student, PeftModel):
            raise TypeError("AdapterOffTeacher needs a LoRA student: set `model.student.lora: {}`")
        with evaluating(student), student.disable_adapter():  # dropout must not disturb the teacher
            yield student


class TextTeacher(Teacher):
    """No network: the text of the data set is the teacher. For supervised fine-tuning (DatasetSource, WrittenToken)."""

    answers = False

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        raise ValueError(
            "TextTeacher has no network to ask or to write with: use `rollout.source: DatasetSource` and "
            "`support: WrittenToken`, or another `model.teacher`"
        )
        yield student
