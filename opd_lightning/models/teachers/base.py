"""What a teacher is, and those that never change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd_lightning import parallel
from opd_lightning.configurable import Configurable
from opd_lightning.models.distributions import DenseLaws, evaluating, head_of, laws_of, prove_head
from opd_lightning.models.loading import DTYPES, load_config, load_model, load_tokenizer, local_folder
from opd_lightning.models.lora import base_of
from opd_lightning.models.processors import load_processor
from opd_lightning.models.students import Student
from opd_lightning.models.translation import Translation
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.types import Prompt, Rendering, TokenLaws


def blind(teacher: Teacher) -> ValueError:
    """What is said when a teacher is to look at something and cannot."""
    return ValueError(
        f"a prompt holds an image (data.prompts), and {type(teacher).__name__} reads text only: take a teacher with a network "
        "of its own that looks (model.teacher: FrozenTeacher), or the student itself"
    )


class Teacher(Configurable):
    """A source of next-token laws. Subclass it for your own: write `speaking` for a network, or `laws` for anything else.

    `build` is called once, after the student was built.

    Attributes:
        answers: False if there is no network to ask, only text.
        writes: False if it can score text, but not write any.
        starts_as_student: True if it is the student's own network before the first step, so that it teaches nothing unless
            its context says more.
        routes: True if its `leaves` share the rows among them, by `route`.
        moving: what makes it change while the student learns, in words; empty if it never changes.
    """

    answers: bool = True
    writes: bool = True
    starts_as_student: bool = False
    routes: bool = False

    @property
    def moving(self) -> str:
        return ""

    @property
    def translation(self) -> Translation | None:
        """How it reads what the student writes, if its tokenizer is another one."""
        return None

    @property
    def known(self) -> int | None:
        """How many of the likeliest entries of its laws it tells, beside the drawn token; None if it tells all of them."""
        return None

    def check(self, student: Student) -> None:
        """Refuse a student that this teacher cannot teach, before any weight is loaded."""

    def leaves(self) -> dict[str, Teacher]:
        """The teachers that it is made of, by name; itself under an empty name if it is one."""
        return {"": self}

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer; None if it is the student's by construction."""
        return None

    def config(self) -> Any:
        """The architecture, without the weights; None if it is the student's by construction."""
        return None

    def processor(self, student: Student) -> Any:
        """What turns the images of a prompt into this teacher's tensors; asked only for prompts that hold some.

        Raises:
            ValueError: for a teacher that cannot look at anything.
        """
        return student.processor()

    def rows(self) -> int | None:
        """Logit rows; None if they are the student's by construction."""
        return None

    def meet(self, vocabulary: Vocabulary) -> None:
        """Prove what a tokenizer and rows at hand do not prove, before any weight is loaded; for models that run elsewhere.

        Raises:
            ValueError: with what to change.
        """

    def build(self, student: nn.Module, share: bool = True) -> None:
        """Load weights. The default teacher has none of its own.

        Args:
            student: as it is before the first step.
            share: weights that are never trained may be the student's own tensors; False where each network is sharded.
        """

    def own_model(self) -> nn.Module | None:
        """The teacher's own network, to be moved to a device or sharded; None if it shares the student's weights."""
        return None

    def route(self, prompt: Prompt) -> int:
        """Which of its `leaves` answers for this prompt, where they share the work (see `Rendering.route`)."""
        return 0

    def writer(self, prompt: Prompt) -> Teacher:
        """The teacher that writes behind this prompt."""
        return self

    def after_step(self, student: nn.Module, step: int) -> None:
        """Called after every optimizer step, on every rank, with the number of steps that are done."""

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint must hold, as plain data and whole CPU tensors. All ranks call it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; it may come before `build`."""

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        """The network in the teacher's state: eval mode, adapters off, ...

        Raises:
            ValueError: for a teacher that is not one network.
        """
        raise ValueError(
            f"{type(self).__name__} has no single network that could write: use `rollout.source: StudentSource` or "
            "`DatasetSource`, or another `model.teacher`"
        )
        yield student

    def prepare(self, text: Rendering) -> None:
        """Called with what it will be asked next, where a run may wait: between optimizer steps and before evaluations.

        Raises:
            Unreachable: if it cannot answer now.
        """

    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TokenLaws:
        """Laws at the completion tokens; no gradient. Under sharding, its own network runs inside its own root."""
        own = self.own_model()
        answer = partial(self._network_laws, student, text, vocab)
        return parallel.run_inside(base_of(own), answer) if own is not None else answer()

    @torch.no_grad()
    def _network_laws(self, student: nn.Module, text: Rendering, vocab: int) -> DenseLaws:
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

    def config(self) -> Any:
        """The architecture, without the weights."""
        return load_config(self.path)

    def processor(self, student: Student) -> Any:
        return load_processor(self.path, local_folder(self.path), self.config())

    def rows(self) -> int:
        return int(self.config().get_text_config().vocab_size)

    def build(self, student: nn.Module, share: bool = True) -> None:
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


def copy_of(student: nn.Module, share: bool) -> nn.Module:
    """A frozen copy in eval mode. Shared, only the trained weights are copied: a LoRA student's base exists once."""
    untrained = {id(p): p for p in student.parameters() if not p.requires_grad}
    model = copy.deepcopy(student, untrained if share else {})
    return model.eval().requires_grad_(False)


class StartTeacher(Teacher):
    """The student as it was before the first step: a frozen copy of its initial weights. A resumed run has the same one."""

    starts_as_student = True

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def build(self, student: nn.Module, share: bool = True) -> None:
        if self.model is None:
            self.model = copy_of(student, share)

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

    starts_as_student = True

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
    writes = False

    @contextmanager
    def speaking(self, student: nn.Module) -> Iterator[nn.Module]:
        raise ValueError(
            "TextTeacher has no network to ask or to write with: use `rollout.source: DatasetSource` and "
            "`support: WrittenToken`, or another `model.teacher`"
        )
        yield student
