"""``opd reproduce``: what is run, what is not run again, and the verdicts.

Every arm of every recipe is run once a seed and leaves a file below ``<folder>/records``, named by all that decides what it
measures. Arms that several recipes share are run once; a stopped command goes on where it was.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from opd_lightning.inspect.reproduce.arms import Arm, Networks, Record, Tick
from opd_lightning.inspect.reproduce.criteria import Judgement
from opd_lightning.inspect.reproduce.recipe import Recipe
from opd_lightning.inspect.subrun import leaving_on_signals

PASS, NULL, FAILED, OPEN = "pass", "null", "failed", "open"


@dataclass(frozen=True)
class Task:
    """One arm, or the training of one network, with one seed.

    Attributes:
        title: what the bar says.
        arm: the arm.
        seed: its seed.
        file: of the record; the task is done if it is there.
        keep: folder of the trained network; None for an arm of a recipe.
        needs: files of the tasks that come before.
    """

    title: str
    arm: Arm
    seed: int
    file: Path
    keep: Path | None = None
    needs: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        return self.file.is_file() and (self.keep is None or self.keep.is_dir())


@dataclass(frozen=True)
class Verdict:
    """A recipe as it stands.

    Attributes:
        recipe: the recipe.
        status: ``pass``, ``null`` (run, and a criterion does not hold), ``failed`` (an arm ended with an error) or ``open``.
        records: arm -> one record a seed, of those that are there.
        judgements: the criteria; empty unless all arms are there.
        error: of the first failed arm.
        seeds: that were asked for.
    """

    recipe: Recipe
    status: str
    records: dict[str, list[Record]]
    judgements: tuple[Judgement, ...]
    seeds: tuple[int, ...]
    error: str = ""

    @property
    def seconds(self) -> float:
        """Of its own arms; the networks below them are not counted."""
        return sum(r.seconds for records in self.records.values() for r in records)


class Plan:
    """All tasks of some recipes.

    Args:
        recipes: what is reproduced.
        networks: where networks lie and how they are trained.
        folder: of records, networks and pages.
        seeds: of every arm; empty takes each recipe's own.
    """

    def __init__(self, recipes: Sequence[Recipe], networks: Networks, folder: Path, seeds: Sequence[int] = ()) -> None:
        self.recipes, self.networks, self.folder = list(recipes), networks, folder
        self.seeds = tuple(dict.fromkeys(seeds))
        self.tasks: dict[Path, Task] = {}
        for recipe in recipes:
            for name, arm in recipe.arms.items():
                for seed in self.seeds_of(recipe):
                    self._add(f"{recipe.name.partition('_')[0].upper()} {name}, seed {seed}", arm, seed)

    def seeds_of(self, recipe: Recipe) -> tuple[int, ...]:
        return self.seeds or recipe.seeds

    def file(self, arm: Arm, seed: int) -> Path:
        """Where the record of an arm lies."""
        return self.folder / "records" / f"{type(arm).__name__.lower()}-{self.networks.key(arm)}-{seed}.json"

    def _add(self, title: str, arm: Arm, seed: int, keep: Path | None = None) -> Path:
        file = self.file(arm, seed) if keep is None else keep.with_suffix(".json")
        if file not in self.tasks:
            networks = {name: self.networks.arm(name) for name in arm.needs}
            below = [self._add(f"network {n}, seed {seed}", a, seed, self.networks.path(n, seed)) for n, a in networks.items()]
            self.tasks[file] = Task(title, arm, seed, file, keep, tuple(below))  # behind what it needs
        return file

    def verdict(self, recipe: Recipe, errors: dict[Path, str]) -> Verdict:
        """A recipe as it stands."""
        seeds = self.seeds_of(recipe)
        files = {name: [self.file(arm, seed) for seed in seeds] for name, arm in recipe.arms.items()}
        records = {name: [Record.load(f) for f in found if f.is_file()] for name, found in files.items()}
        failed = [errors[f] for found in files.values() for f in found if f in errors]
        if failed or any(len(found) < len(seeds) for found in records.values()):
            return Verdict(recipe, FAILED if failed else OPEN, records, (), seeds, failed[0] if failed else "")
        each = [{name: found[i].figures for name, found in records.items()} for i in range(len(seeds))]
        judgements = tuple(criterion.judge(each) for criterion in recipe.criteria)
        return Verdict(recipe, PASS if all(j.holds for j in judgements) else NULL, records, judgements, seeds)


def measure(task: Task, networks: Networks, tick: Tick) -> None:
    """Run one task and leave its record."""
    started = time.perf_counter()
    record = task.arm.run(task.seed, networks, tick, task.keep)
    replace(record, seconds=time.perf_counter() - started).save(task.file)


def _ready_worker() -> None:
    """One core, and Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _in_worker(task: Task, networks: Networks) -> None:
    measure(task, networks, lambda share: None)


def run(plan: Plan, jobs: int, after: Callable[[dict[Path, str]], None]) -> dict[Path, str]:
    """Run what is not done.

    Args:
        plan: the tasks.
        jobs: processes; 1 runs everything in this one.
        after: called when a task is over, with the errors so far.

    Returns:
        file -> error of the tasks that failed, and of those that need them; the others are done.
    """
    todo = [task for task in plan.tasks.values() if not task.done]
    form = "{desc} {percentage:3.0f}%|{bar:20}| [{elapsed}<{remaining}]"
    total = sum(task.arm.work for task in plan.tasks.values())
    ahead = total - sum(task.arm.work for task in todo)
    if len(todo) < len(plan.tasks):
        print(f"{len(plan.tasks) - len(todo)} of {len(plan.tasks)} measurements are there already", file=sys.stderr)
    shown: dict[str, Any] = {"bar_format": form, "dynamic_ncols": True, "file": sys.stderr, "smoothing": 0, "disable": not todo}
    bar: Any = tqdm(total=total, initial=ahead, **shown)
    with leaving_on_signals(), bar:
        return (_alone if jobs == 1 else _together)(todo, plan.networks, jobs, bar, after)


def _error(task: Task, error: BaseException, bar: Any) -> str:
    log = task.file.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = f"{type(error).__name__}: {error}"
    bar.write(f"{task.title} failed: {text}\n  (where: {log})", file=sys.stderr)
    return text


def _blocked(task: Task, errors: dict[Path, str]) -> str:
    return next((errors[file] for file in task.needs if file in errors), "")


def _alone(
    todo: list[Task], networks: Networks, jobs: int, bar: Any, after: Callable[[dict[Path, str]], None]
) -> dict[Path, str]:
    errors: dict[Path, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for two
    try:
        for task in todo:
            bar.set_description_str(task.title)
            before = bar.n

            def tick(share: float, task: Task = task, before: float = before) -> None:
                bar.update(max(before + min(share, 1.0) * task.arm.work - bar.n, 0.0))

            if blocked := _blocked(task, errors):
                errors[task.file] = blocked
            else:
                try:
                    measure(task, networks, tick)
                except Exception as error:
                    errors[task.file] = _error(task, error, bar)
            tick(1.0)
            after(errors)
    finally:
        torch.set_num_threads(threads)
    return errors


def _together(
    todo: list[Task], networks: Networks, jobs: int, bar: Any, after: Callable[[dict[Path, str]], None]
) -> dict[Path, str]:
    errors: dict[Path, str] = {}
    waiting = list(todo)
    running: dict[Future[None], Task] = {}
    undone = {task.file for task in todo}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _ready_worker)
    try:
        while waiting or running:
            for task in [t for t in waiting if not undone.intersection(t.needs)]:
                if len(running) == jobs:
                    break
                waiting.remove(task)
                if blocked := _blocked(task, errors):
                    errors[task.file] = blocked
                    undone.discard(task.file)
                else:
                    running[pool.submit(_in_worker, task, networks)] = task
            bar.set_description_str(" | ".join(task.title for task in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                undone.discard(task.file)
                if (failed := future.exception()) is not None:
                    errors[task.file] = _error(task, failed, bar)
                bar.update(task.arm.work)
                after(errors)
    finally:
        for process in (getattr(pool, "_processes", None) or {}).values() if running else ():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    return errors
