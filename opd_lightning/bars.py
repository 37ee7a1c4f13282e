"""Progress bars of parts of the work, which step back where a bar of the whole is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

_hidden = False


def bar(*args: Any, **kwargs: Any) -> Any:
    """tqdm's, gone when it is done; none at all inside `only_the_outer`."""
    return tqdm(*args, **{"leave": False, **kwargs, "disable": _hidden or kwargs.get("disable", False)})


@contextmanager
def only_the_outer() -> Iterator[None]:
    """Without further bars inside: lines of two that do not know each other mix."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before
