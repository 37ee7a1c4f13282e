"""A teacher out of an earlier run."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from opd_lightning.models.distributions import prove_head
from opd_lightning.models.loading import load_config, load_model, local_folder
from opd_lightning.models.processors import load_processor
from opd_lightning.models.students import Student
from opd_lightning.models.teachers.base import FrozenTeacher

__all__ = ["CheckpointTeacher"]


class CheckpointTeacher(FrozenTeacher):
    """The student of an earlier run: a checkpoint of this package, or a folder that ``opd export`` wrote, adapters included.

    With it runs are chained: the student of a run with a verifier teaches the base that it came from, or a supervised run
    comes first.

    Args:
        path: a ``.ckpt`` file, a folder with a model or an adapter, or any other path that `FrozenTeacher` takes.
        dtype: of the weights of a folder; a checkpoint's are what its own recipe says.

    Raises:
        FileNotFoundError: for a ``.ckpt`` file that does not exist.
    """

    def __init__(self, path: str, dtype: str = "float32") -> None:
        super().__init__(path, dtype)
        self.file = Path(path).expanduser()
        if self.is_run and not self.file.is_file():
            raise FileNotFoundError(f"model.teacher.path={path!r}: there is no such checkpoint")

    @property
    def is_run(self) -> bool:
        """Whether the path is a checkpoint of this package."""
        return self.file.suffix == ".ckpt"

    @cached_property
    def _checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        if "student" not in state.get("hyper_parameters", {}):
            raise ValueError(f"{self.path} is no checkpoint of this package: it does not say how its student is built")
        return {key: state[key] for key in ("hyper_parameters", "state_dict")}  # not the optimizer's states

    @cached_property
    def _recipe(self) -> Student:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--student", type=Student)
        read = parser.parse_object({"student": self._checkpoint["hyper_parameters"]["student"]})
        recipe: Student = parser.instantiate_classes(read).student
        return recipe

    @property
    def _base(self) -> str:
        """The folder that holds architecture and weights: an adapter's folder names it."""
        if (self.file / "adapter_config.json").is_file():
            return str(PeftConfig.from_pretrained(str(self.file)).base_model_name_or_path)
        return self.path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._recipe.tokenizer() if self.is_run else super().tokenizer()

    def config(self) -> Any:
        return self._recipe.config() if self.is_run else load_config(self._base)

    def processor(self, student: Student) -> Any:
        return self._recipe.processor() if self.is_run else load_processor(self.path, local_folder(self._base), self.config())

    def build(self, student: nn.Module, share: bool = True) -> None:
        if self.model is not None:
            return
        model = self._from_run() if self.is_run else load_model(self._base, self.dtype)
        if not self.is_run and self._base != self.path:
            model = PeftModel.from_pretrained(model, str(self.file))  # type: ignore[arg-type]
        self.model = model.eval().requires_grad_(False)
        prove_head(self.model)

    def _from_run(self) -> nn.Module:
        model, weights = self._recipe.build(), self._checkpoint["state_dict"]
        del self._checkpoint  # the recipe has been read
        trained = {f"student.{n}" for n, p in model.named_parameters() if p.requires_grad}
        if missing := trained - weights.keys():
            raise ValueError(f"{self.path} lacks {len(missing)} trained tensors of its own student (first: {min(missing)})")
        model.load_state_dict({k.removeprefix("student."): v for k, v in weights.items() if k in trained}, strict=False)
        return model
