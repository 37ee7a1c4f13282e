"""A teacher with a tokenizer of its own."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from opd_lightning.models.students import Student
from opd_lightning.models.teachers.base import FrozenTeacher, blind
from opd_lightning.models.translation import TranslatedLaws, Translation
from opd_lightning.models.vocabulary import Vocabulary, extra_eos
from opd_lightning.types import Rendering

__all__ = ["CrossTokenizerTeacher"]


class CrossTokenizerTeacher(FrozenTeacher):
    """A network whose tokenizer is not the student's.

    It reads the student's text in its own tokens. Where both tokenizers begin a token at the same byte its law is compared with
    the student's; other positions are not scored, and their share is logged (``rollout/scored_positions``). It needs
    ``support: MatchedVocab``, and scores text but writes none.

    Args:
        path: a hub name, a folder, a ``.gguf`` file, ``zoo/<task>/<model>``, or ``package:<module>/<file>``.
        dtype: of the weights.

    Raises:
        ValueError: for an unknown dtype.
    """

    writes = False

    def __init__(self, path: str, dtype: str = "float32") -> None:
        super().__init__(path, dtype)
        self._student: Student | None = None

    def check(self, student: Student) -> None:
        self._student = student

    def processor(self, student: Student) -> Any:
        raise blind(self)

    @cached_property
    def translation(self) -> Translation:  # type: ignore[override]
        """Between the student's vocabulary and its own."""
        if self._student is None:
            raise RuntimeError("CrossTokenizerTeacher.check(student) comes first: OPDModule calls it")
        ours = Vocabulary.of(self._student.tokenizer(), extra_eos(self._student.config()))
        return Translation(ours, Vocabulary.of(self.tokenizer(), extra_eos(self.config())))

    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TranslatedLaws:
        law = super().laws(student, text, self.translation.theirs.size)
        return self.translation.laws(law, text.ids.device)
