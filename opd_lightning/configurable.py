"""Objects that remember how they were made.

A checkpoint stores how to build a module as plain data, never as pickled objects. LightningCLI knows the configuration of
what it builds; `Configurable` gives an object built in Python the same memory, so both save the same hyper-parameters and
`OPDModule.load_from_checkpoint(path)` works for both.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from enum import Enum
from pathlib import Path
from typing import Any


def class_path(cls: type) -> str:
    """The importable name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def to_plain(value: Any) -> Any:
    """The configuration of ``value`` as strings, numbers, lists and dicts, in the form that LightningCLI reads.

    Raises:
        TypeError: for an object that does not know how it was made; `functools.partial` of a class is understood.
    """
    if isinstance(value, Configurable):
        return value.to_config()
    if isinstance(value, functools.partial):
        # partial(Class, ...), or jsonargparse's own partial(instantiate, Class, ...)
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if len(classes) == 1:
            return {"class_path": class_path(classes[0]), "init_args": to_plain(value.keywords)}
    if isinstance(value, type):
        return {"class_path": class_path(value)}
    if inspect.isfunction(value) and "<" not in value.__qualname__:  # importable by name, unlike a lambda or a closure
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{value!r} cannot be stored in a checkpoint: give a Configurable, plain data, or functools.partial(Class, ...)"
    )


class Configurable:
    """Base of everything that YAML can name: remembers the arguments of its outermost constructor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__dict__.get("__init__")
        if init is None:
            return
        signature = inspect.signature(init)

        @functools.wraps(init)
        def remembering(self: Any, *args: Any, **kwds: Any) -> None:
            if "_init_args" not in self.__dict__:  # not for super().__init__
                bound = signature.bind(self, *args, **kwds)
                bound.apply_defaults()
                self.__dict__["_init_args"] = dict(list(bound.arguments.items())[1:])
            init(self, *args, **kwds)

        cls.__init__ = remembering  # type: ignore[method-assign]

    def to_config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": ...}``, nested."""
        return {"class_path": class_path(type(self)), "init_args": to_plain(self.__dict__.get("_init_args", {}))}

    def __repr__(self) -> str:
        arguments = self.__dict__.get("_init_args", {})
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
