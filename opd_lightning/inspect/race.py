"""``opd race``: methods side by side at equal budgets, every method and seed a run of its own.

A race is planned and checked as a whole (`plan`) before the first run starts. What it has done stands in its folder: a run is
finished if its ``summary.json`` is there and its ``config.yaml`` says what this race asks for.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from opd_lightning import configfiles
from opd_lightning.inspect import courses, standings, subrun
from opd_lightning.inspect.report import can_draw
from opd_lightning.inspect.runs import curves
from opd_lightning.inspect.setups import Setup
from opd_lightning.inspect.standings import DONE, FAILED, LABEL, OPEN, Result

OFF = ["--report.controls", "{}", "--report.fields", "{}", "--report.label", LABEL, "--eval.every_n_steps", "0"]
OFF += ["--trainer.enable_progress_bar", "false"]
"""A run of a race is measured before and after, and shows nothing of its own, unless flags say otherwise."""
POLL_SECONDS = 2.0


Read = Callable[[list[str]], Setup]
"""Parses the words of a run without starting it."""


@dataclass(frozen=True)
class Settings:
    """What a race is asked for.

    Attributes:
        configs: configurations below all runs.
        methods: configurations laid over them, one a method; ``all`` for every shipped one.
        seeds: of each method.
        folder: of the race.
        max_steps: optimizer steps of a run; None takes the configuration's.
        flags: further words of ``opd fit`` for all runs.
    """

    configs: list[str]
    methods: list[str]
    seeds: list[int]
    folder: Path
    max_steps: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method, seed: which one.
        folder: of the run.
        words: behind ``opd fit``.
        setup: what they mean.
    """

    method: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    setup: Setup

    @property
    def steps(self) -> int:
        steps: int = self.setup.config["trainer"]["max_steps"]
        return steps

    @property
    def unchanged(self) -> bool:
        """Whether the folder holds a run of this configuration."""
        try:
            found = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return False
        return isinstance(found, dict) and _essence(found) == _essence({**self.setup.config, "seed_everything": self.seed})

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file() and self.unchanged

    def result(self, error: str = "") -> Result:
        """The run as it stands."""
        completions = self.steps * self.setup.config["data"]["batch_size"]
        target = str(self.setup.module.objective.declared_target)
        result = Result(self.method, self.seed, target, completions, FAILED if error else OPEN, error)
        if not self.finished:
            return result
        found = standings.measurements(self.folder)
        if broken := [f"{key}={value}" for key, value in found["after"].items() if not math.isfinite(value)]:
            return replace(result, status=FAILED, error=f"the trained student measures {', '.join(broken)}")
        return replace(result, status=DONE, error="", after=found["after"], before=found["before"], teacher=found["teacher"])


def _essence(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where and how far, not what: the folder and the checkpoint."""
    kept = {k: v for k, v in config.items() if k not in ("ckpt_path", "weights_only")}
    return {**kept, "trainer": {k: v for k, v in kept["trainer"].items() if k != "default_root_dir"}}


# ---- planning --------------------------------------------------------------------------------------------------------------


def plan(settings: Settings, read: Read) -> list[Run]:
    """All runs of a race, the first seed of every method before the second, so that an early look compares all methods.

    Raises:
        ValueError: for a race that cannot be run or would compare nothing, naming what to change.
        FileNotFoundError: for a configuration that does not exist, naming near ones.
    """
    if not settings.seeds:
        raise ValueError("--seeds: none given; write at least one whole number, better three or more: --seeds 0 1 2")
    if min(settings.seeds) < 0 or max(settings.seeds) >= 2**32:
        raise ValueError(
            f"--seeds {' '.join(map(str, settings.seeds))}: each must lie between 0 and 2^32 - 1, e.g. --seeds 0 1 2"
        )
    if settings.max_steps is not None and settings.max_steps < 1:
        raise ValueError(f"--max_steps {settings.max_steps}: a run needs at least 1 optimizer step, e.g. --max_steps 100")
    methods = _methods(settings.methods)
    checked = {method: _checked(settings, file, read) for method, file in methods.items()}
    runs = []
    for seed in dict.fromkeys(settings.seeds):
        for method, (words, setup) in checked.items():
            folder = settings.folder / method / f"seed-{seed}"
            own = ("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder))
            runs.append(Run(method, seed, folder, (*words, *own), setup))
    return runs


def _methods(names: list[str]) -> dict[str, str]:
    """Name of the method -> configuration."""
    known = [name for name in configfiles.shipped() if name.startswith("methods/")]
    if not names:
        raise ValueError(f"--methods: none given; write `all` or some of {', '.join(known)}, or files of your own")
    found: dict[str, str] = {}
    for name in known if names == ["all"] else names:
        try:
            configfiles.find(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--methods: {error} Shipped methods: {', '.join(known)}; `all` takes them all.") from error
        short = Path(name).stem
        if found.setdefault(short, name) != name:
            raise ValueError(f"--methods: {found[short]} and {name} are both called {short!r}: rename one of the files")
    return found


def _checked(settings: Settings, file: str, read: Read) -> tuple[list[str], Setup]:
    """The words of a method's runs, but for seed and folder, and what they mean."""
    who = f"{file} over {' '.join(settings.configs) or 'base.yaml'}"
    words = [word for name in (*settings.configs, file) for word in ("-c", name)] + [*OFF, *settings.flags]
    if settings.max_steps is not None:
        words += ["--trainer.max_steps", str(settings.max_steps)]
    try:
        found = read(words)
        found.declared()
    except SystemExit:  # the parser has said what is wrong
        print(f"(in {who}; no run was started)", file=sys.stderr)
        raise
    except Exception as error:
        raise ValueError(f"{who}: {error}\n(no run was started)") from error
    data, trainer = found.config["data"], found.config["trainer"]
    if not data["held_out"] and not data["held_out_prompts"]:
        raise ValueError(
            f"{who} holds out no prompts, so nothing would be compared: set data.held_out (rows of the prompt set, e.g. "
            "--data.held_out 200) or data.held_out_prompts"
        )
    if trainer["max_steps"] < 1:
        raise ValueError(f"{who} has trainer.max_steps={trainer['max_steps']}, no end to compare at: e.g. --max_steps 100")
    callbacks = trainer["callbacks"] or []
    kept = [c for c in callbacks if not c["class_path"].endswith("CompletionTable")]
    if len(kept) < len(callbacks):  # items of a list cannot be switched off, so the list is replaced
        trainer["callbacks"] = kept
        words += ["--trainer.callbacks", json.dumps(kept)]
    return words, found


# ---- running ---------------------------------------------------------------------------------------------------------------


def run(settings: Settings, read: Read) -> bool:
    """Run what is not finished yet, keep the tables up to date, and show the last one.

    Returns:
        Whether every run is finished; a failed one does not stop the others.
    """
    runs = plan(settings, read)
    draw = can_draw("race.png")
    errors: dict[tuple[str, int], str] = {}

    def keep() -> list[Result]:
        results = [r.result(errors.get((r.method, r.seed), "")) for r in runs]
        standings.write(settings.folder, results, draw)
        courses.write(settings.folder, [(r.method, r.seed, r.folder) for r in runs if r.finished], draw)
        return results

    keep()
    todo = [r for r in runs if not r.finished]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    with subrun.leaving_on_signals(), _bar(runs, todo) as bar:
        for number, one in enumerate(todo, len(runs) - len(todo) + 1):
            bar.set_description_str(f"run {number}/{len(runs)} {one.method} seed {one.seed}")
            errors[one.method, one.seed] = _train(one, bar)
            result = next(r for r in keep() if (r.method, r.seed) == (one.method, one.seed))
            if result.status == FAILED:
                bar.write(
                    f"{one.method}, seed {one.seed} failed: {result.error}\n  (all it said: {_log(one)})", file=sys.stderr
                )
    results = keep()
    print("\n" + standings.markdown(results))
    shown = [f.name for f in sorted(settings.folder.glob("race*.*")) if f.name != "race.md"]
    print(f"race  {settings.folder / 'race.md'}, {', '.join(shown)}")
    return all(r.status == DONE for r in results)


def _bar(runs: list[Run], todo: list[Run]) -> Any:
    """Over the optimizer steps of all runs; what was done before does not count for the time left."""
    total = sum(r.steps for r in runs)
    form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}]"
    done = total - sum(r.steps for r in todo)
    return tqdm(total=total, initial=done, bar_format=form, dynamic_ncols=True, file=sys.stderr, smoothing=0, disable=not todo)


def _log(one: Run) -> Path:
    return one.folder.with_suffix(".log")


def _train(one: Run, bar: Any) -> str:
    """One run in a process of its own, continued where it stands; its error if it failed, else empty."""
    words, before = list(one.words), bar.n
    if one.unchanged:
        words += ["--ckpt_path", "last"]
        already = min(_steps_done(one.folder), one.steps)
        bar.initial += already  # they took no time of this race's
        bar.update(already)
    log = _log(one)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        # A session of its own: Ctrl-C reaches this process alone, which asks the run for a checkpoint.
        child = subprocess.Popen(
            subrun.command(words), env=subrun.environment(), stdout=said, stderr=said, start_new_session=True
        )
        try:
            while _waiting(child):
                bar.update(max(before + min(_steps_done(one.folder), one.steps) - bar.n, 0))
        finally:
            _stop(child)
    bar.update(before + one.steps - bar.n)
    return "" if one.finished else subrun.last_error(log.read_text(encoding="utf-8", errors="replace"), child.returncode)


def _waiting(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _steps_done(folder: Path) -> int:
    try:
        found = curves(folder).get("train/loss", [])
    except (OSError, ValueError, TypeError, KeyError):  # read while it is being written
        return 0
    return found[-1][0] + 1 if found else 0


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a run that is still there for a checkpoint and wait for it; a second signal ends the waiting and the run."""
    if child.poll() is not None:
        return
    child.terminate()
    print("\nstopping after this optimizer step; the same command continues the race (again: stop at once)", file=sys.stderr)
    try:
        child.wait()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
