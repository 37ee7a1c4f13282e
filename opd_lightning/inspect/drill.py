"""``opd resume-drill``: is resuming exact for this configuration, wherever it is interrupted?

The configuration runs a few steps as reference. Then copies of it are ended at every moment in every way, resumed with
``--ckpt_path last`` and compared with the reference, bit for bit: rollouts, losses, metrics, and the last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from opd_lightning.callbacks.recovery import checkpoints, last_checkpoint
from opd_lightning.inspect import subrun
from opd_lightning.inspect.moments import MOMENTS, Way, digest
from opd_lightning.inspect.setups import Setup

WAYS: tuple[str, ...] = get_args(Way)
EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "exception": 1}
HELD_OUT = 16
"""Most prompts of an evaluation in a drill."""
PATIENCE = 10
"""A run that takes so many times as long as the reference, and a minute more, hangs."""
Notes = dict[tuple[str, str, str], str]
"""(kind, where, rank) -> value."""


@dataclass(frozen=True)
class Schedule:
    """When things happen in the runs of a drill, in optimizer steps.

    A checkpoint every two or three steps lies in the middle of most refreshes; moments count after the first one, so that
    every run has something to come back to and something to repeat.

    Attributes:
        checkpoint: between two checkpoints; the first moment comes after the first one.
        steps: of a run: to the refresh boundary and the checkpoint after that, and two more.
    """

    checkpoint: int
    steps: int

    @classmethod
    def of(cls, every_n_steps: int) -> Schedule:
        """For a number of steps between two refreshes.

        >>> Schedule.of(1), Schedule.of(2)
        (Schedule(checkpoint=2, steps=6), Schedule(checkpoint=3, steps=8))
        """
        checkpoint = 2 if every_n_steps % 2 else 3
        boundary = every_n_steps * (checkpoint // every_n_steps + 1)
        return cls(checkpoint, max(boundary, 2 * checkpoint) + 2)


@dataclass(frozen=True)
class Outcome:
    """How one interrupted run came back.

    Attributes:
        moment: see `MOMENTS`.
        way: how it ended there.
        resumed_from: step of the checkpoint that it went on from; None if it did not get so far.
        differs: what is not as in the reference; empty if all is.
    """

    moment: str
    way: str
    resumed_from: int | None
    differs: tuple[str, ...]

    @property
    def line(self) -> str:
        found = "; ".join(self.differs) or "equal"
        return found if self.resumed_from is None else f"resumed from step {self.resumed_from}, {found}"

    def plain(self) -> dict[str, Any]:
        return {
            "moment": MOMENTS[self.moment],
            "way": self.way,
            "resumed_from": self.resumed_from,
            "equal": not self.differs,
            "differs": list(self.differs),
        }


class Drill:
    """The runs of a drill, below one folder.

    Args:
        words: of ``opd fit``.
        setup: what they mean.
        folder: of all runs.
    """

    def __init__(self, words: Sequence[str], setup: Setup, folder: Path) -> None:
        self.folder, self.schedule = folder, Schedule.of(setup.rollout.every_n_steps)
        self.callbacks = [
            c for c in setup.config["trainer"]["callbacks"] or [] if not c["class_path"].endswith("OPDCheckpoint")
        ]
        held_out = min(setup.config["data"]["held_out"], HELD_OUT)
        flags: dict[str, Any] = {
            "trainer.max_steps": self.schedule.steps,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "eval.every_n_steps": self.schedule.checkpoint + 1,
            "data.held_out": held_out,
            "report.controls": "{}",
            "report.fields": "{}",
            "ckpt_path": "last",
        }
        if setup.config["cold_start"]["steps"]:
            flags["cold_start.steps"] = setup.rollout.every_n_steps
        self.words = [*words, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]
        self.seconds = 0.0

    def reference(self) -> tuple[Notes, list[str]]:
        """The uninterrupted run: its notes, and the moments that it has.

        Raises:
            ValueError: if it fails.
        """
        began = time.monotonic()
        code = self._run("reference", None, None)
        self.seconds = time.monotonic() - began
        if code:
            log = (self.folder / "reference.log").read_text(encoding="utf-8", errors="replace")
            raise ValueError(f"the run fails without any interruption: {subrun.last_error(log, code or 0)}\n{log[-2000:]}")
        notes = self._notes("reference")
        there = {where for kind, where, _ in notes if kind == "moments"}
        return notes, [moment for moment in MOMENTS if moment in there]

    def case(self, moment: str, way: str, expected: Notes) -> Outcome:
        """Interrupt a run, resume it, compare it."""
        name = f"{moment}-{way}"
        code = self._run(name, moment, way)
        if code != EXIT_CODES[way]:
            return Outcome(moment, way, None, (self._ending("the interrupted run", name, code, EXIT_CODES[way]),))
        last = last_checkpoint(self.folder / name)
        if last is None:
            return Outcome(moment, way, None, ("no checkpoint was left",))
        code = self._run(name, None, None)
        step = int(last.stem.partition("-")[2])
        if code:
            return Outcome(moment, way, step, (self._ending("the resumed run", name, code, 0),))
        return Outcome(moment, way, step, tuple(differences(expected, self._notes(name))))

    def _ending(self, which: str, name: str, code: int | None, expected: int) -> str:
        log = self.folder / f"{name}.log"
        if code is None:
            return f"{which} hangs ({log})"
        said = subrun.last_error(log.read_text(encoding="utf-8", errors="replace"), code)
        return f"{which} ended with {code} instead of {expected}: {said} ({log})"

    def _run(self, name: str, moment: str | None, way: str | None) -> int | None:
        """A run, or the rest of one; its exit code, None if it hangs."""
        root = self.folder / name
        drilled = {"record": str(root) + ".notes", "after": self.schedule.checkpoint, "moment": moment}
        own = [
            {"class_path": "OPDCheckpoint", "init_args": {"every_n_steps": self.schedule.checkpoint, "keep": 2}},
            {"class_path": "opd_lightning.inspect.moments.Drilled", "init_args": drilled | ({"way": way} if way else {})},
        ]
        words = [*self.words, "--trainer.default_root_dir", str(root)]
        words += ["--trainer.callbacks", json.dumps(self.callbacks + own)]
        with (self.folder / f"{name}.log").open("ab") as said:
            child = subprocess.Popen(
                subrun.command(words), env=subrun.environment(), stdout=said, stderr=said, start_new_session=True
            )
            try:
                return child.wait(60 + PATIENCE * self.seconds if self.seconds else None)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()

    def _notes(self, name: str) -> Notes:
        """What every rank noted and what the last checkpoint holds. Steps that ran twice must have been equal twice."""
        notes: Notes = {}
        for file in sorted(self.folder.glob(f"{name}.notes.*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                what, where, value = json.loads(line)
                key = (what, where, file.suffix)
                notes[key] = value if notes.get(key, value) == value else "two values"
        (last, *_) = checkpoints(self.folder / name / "checkpoints")
        with _single_file(last) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        optimizer = state["optimizer_0"] if "optimizer_0" in state else state["optimizer_states"][0]
        parts = {"weights": state["state_dict"], "optimizer": optimizer["state"], "teachers": state.get("teachers", {})}
        for part, tensors in parts.items():
            notes |= {(part, str(key), ""): digest(value) for key, value in tensors.items()}
        return notes


@contextmanager
def _single_file(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint as one file, also where every process wrote its own part."""
    if checkpoint.is_file():
        yield checkpoint
        return
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "one.ckpt")
        yield Path(folder) / "one.ckpt"


def differences(expected: Notes, found: Notes) -> list[str]:
    """What is not equal, a line for every kind, naming the first.

    >>> differences({("losses", "micro-batch 0", ""): "a"}, {("losses", "micro-batch 0", ""): "b"})
    ['losses: 1 of 1 (first: micro-batch 0)']
    """
    lines = []
    for kind in dict.fromkeys(key[0] for key in expected if key[0] != "moments"):
        keys = [key for key in expected if key[0] == kind]
        if wrong := [key for key in keys if found.get(key) != expected[key]]:
            lines.append(f"{kind}: {len(wrong)} of {len(keys)} (first: {wrong[0][1]})")
    return lines


def run(
    words: Sequence[str],
    setup: Setup,
    folder: Path | None,
    moments: Sequence[str],
    ways: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[Outcome], list[str]]:
    """All cases of a drill, and the moments that the configuration does not have.

    Args:
        words: of ``opd fit``.
        setup: what they mean.
        folder: keeps every run; None is a temporary folder, which stays only if something differs.
        moments, ways: which.
        say: takes a line of progress.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--folder {folder} is not empty: a drill begins with nothing")
    root = Path(tempfile.mkdtemp(prefix="opd-drill-")) if folder is None else folder
    root.mkdir(parents=True, exist_ok=True)
    drill = Drill(words, setup, root)
    say(f"reference: {drill.schedule.steps} steps, a checkpoint every {drill.schedule.checkpoint}, in {root}")
    expected, there = drill.reference()
    cases = [(moment, way) for moment in moments if moment in there for way in ways]
    say(f"it took {drill.seconds:.0f} s; {len(cases)} cases follow, two runs each")
    outcomes = []
    for number, (moment, way) in enumerate(cases, 1):
        began = time.monotonic()
        outcomes.append(drill.case(moment, way, expected))
        seconds = time.monotonic() - began
        say(f"[{number}/{len(cases)}] {MOMENTS[moment]}, {way}: {outcomes[-1].line} ({seconds:.0f} s)")
        if folder is None and not outcomes[-1].differs:
            shutil.rmtree(root / f"{moment}-{way}", ignore_errors=True)
    if folder is None and not any(o.differs for o in outcomes):
        shutil.rmtree(root, ignore_errors=True)
    return outcomes, [moment for moment in moments if moment not in there]


def table(outcomes: Sequence[Outcome], absent: Sequence[str]) -> str:
    """A line for every case."""
    width = max(len(words) for words in MOMENTS.values())
    lines = [f"{'moment':{width}}  {'ended by':9}  from step  result"]
    for o in outcomes:
        step = "-" if o.resumed_from is None else str(o.resumed_from)
        lines.append(f"{MOMENTS[o.moment]:{width}}  {o.way:9}  {step:>9}  {'; '.join(o.differs) or 'equal'}")
    lines += [f"{MOMENTS[moment]:{width}}  does not occur in this configuration" for moment in absent]
    wrong = sum(bool(o.differs) for o in outcomes)
    lines.append(f"{len(outcomes) - wrong} of {len(outcomes)} came back to the bit")
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome], absent: Sequence[str]) -> str:
    """The same as plain data."""
    found = {"cases": [o.plain() for o in outcomes], "absent": [MOMENTS[m] for m in absent]}
    return json.dumps(found | {"equal": all(not o.differs for o in outcomes)}, indent=2)


def progress(line: str) -> None:
    """To the terminal, beside the table."""
    print(line, file=sys.stderr, flush=True)
