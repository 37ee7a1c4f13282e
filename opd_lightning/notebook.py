"""What a notebook asks for: a configured run, one optimizer step at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_lightning import cli
from opd_lightning.inspect.steps import Step, walk

QUIET: dict[str, Any] = {
    "trainer.enable_progress_bar": False,
    "trainer.enable_checkpointing": False,
    "trainer.logger": False,
    "trainer.devices": 1,
    "data.held_out": 0,
    "data.held_out_prompts": None,
    "report.controls": {},
}
"""A walk through a run leaves nothing behind and evaluates nothing, unless it is asked to."""


def steps(
    config: str | Sequence[str] = "quickstart.yaml",
    overrides: Mapping[str, Any] | None = None,
    k: int = 5,
    shown: int = 4,
) -> Iterator[Step]:
    """The optimizer steps of a run, made by the same Trainer and module as ``opd fit``::

        for step in steps("quickstart.yaml", {"trainer.max_steps": 3, "data.batch_size": 8}):
            step.show()                      # coloured tokens; step.rollouts, step.advantage, step.metrics, step.module

    The loop may be left at any step. Files of the run go into a temporary folder; no held-out prompts are measured.

    Args:
        config: a file or a shipped name (see ``opd configs``), or several that are laid over each other.
        overrides: flags of ``opd fit`` without their dashes.
        k: likeliest tokens that are kept of both models.
        shown: rollouts that a step shows.

    Raises:
        ValueError: for a configuration that ``opd fit`` refuses.
    """
    names = [config] if isinstance(config, str) else list(config)
    words = [word for name in names for word in ("-c", str(name))]
    with tempfile.TemporaryDirectory(prefix="opd-steps-") as folder:
        for key, value in {"trainer.default_root_dir": folder, **QUIET, **(overrides or {})}.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        built = cli.prepared(words)
        yield from walk(built.trainer, built.model, built.datamodule, k, shown)
