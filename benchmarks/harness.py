"""What every benchmark shares: workers that take turns, medians, the machine's description, results on disk."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocol import MARK, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "benchmarks"
PEERS = ROOT / "build" / "peers"
RESULTS = HERE / "results"
QUIET = 0.06
"""A repetition is undisturbed if other processes used less than this share of the machine's processors meanwhile."""


# ---- the command line --------------------------------------------------------------------------------------------------------
def parser(about: str, rounds: int) -> argparse.ArgumentParser:
    """Flags that every script takes."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs; records nothing in results/")
    made.add_argument("--rounds", type=int, default=rounds, help="timed repetitions of every side")
    made.add_argument("--warmup", type=int, default=1, help="untimed repetitions of every side before them")
    made.add_argument("--only", nargs="*", default=[], metavar="CASE", help="leave out all other cases")
    made.add_argument("--out", type=Path, help="folder of the JSON and Markdown files (default: benchmarks/results)")
    made.add_argument("--json", action="store_true", help="print the ratios alone, as one JSON object, as the last line")
    made.add_argument("--peers", type=Path, default=PEERS, help="folder of the peers' environments (see peers.py)")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further keys of `opd fit`, for our side")
    return made


def chosen(given: argparse.Namespace, cases: Sequence[str]) -> list[str]:
    """The cases to run.

    Raises:
        SystemExit: for a name that is none of them.
    """
    if unknown := sorted(set(given.only) - set(cases)):
        raise SystemExit(f"--only {' '.join(unknown)}: the cases are {', '.join(cases)}")
    return [case for case in cases if case in given.only or not given.only]


def peer_python(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        SystemExit: if it was not made yet.
    """
    found = folder / name / "bin" / "python"
    if not found.exists():
        raise SystemExit(f"no {found}: make it with `python benchmarks/peers.py --folder {folder} {name}`")
    return found


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


# ---- the machine -------------------------------------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """Processor, memory, versions and commit, for the head of every result."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.is_file():
        lines = info.read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "")
        model = named[0] if named else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import torch

    found: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions("torch", "transformers", "lightning", "peft"),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str:
    """The commit of this tree, with ``+`` behind it where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


class Load:
    """Share of the machine's processors that processes other than ours use."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.before = self._ticks()

    def _ticks(self) -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        if not stat.is_file():
            return math.nan, math.nan, math.nan
        fields = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        ours = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        for pid in self.pids:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += sum(int(x) for x in words[11:15])  # user and system time, its own and its finished children's
        return sum(fields), sum(fields) - fields[3] - fields[4], ours

    def others(self) -> float:
        """Since this object was made; NaN where the system does not say."""
        total, busy, ours = (now - then for now, then in zip(self._ticks(), self.before, strict=True))
        return round(max(0.0, busy - ours) / max(total, 1.0), 3)


# ---- workers -----------------------------------------------------------------------------------------------------------------
class Worker:
    """A long-lived process that does one thing when it is told to, and sleeps otherwise.

    Args:
        name: shown in messages.
        command: interpreter, script and flags.
        env: further environment variables.
    """

    def __init__(self, name: str, command: Sequence[object], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = Path(tempfile.mkstemp(prefix=f"{name}-", suffix=".log")[1])
        plain = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
        say(f"  starting {name} (log: {self.log})")
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, **plain, **(env or {})},
            cwd=ROOT,
        )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        printed: list[str] = []
        for line in self.process.stdout:
            if line.startswith(MARK):
                got: dict[str, Any] = json.loads(line[len(MARK) :])
                return got
            printed.append(line)
        tail = "".join([*printed[-10:], *self.log.read_text(errors="replace").splitlines(keepends=True)[-30:]])
        raise RuntimeError(f"{self.name} ended with code {self.process.wait()}:\n{tail}")

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process, if it still runs."""
        if self.process.poll() is not None:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def fit_worker(given: argparse.Namespace, config: Path, *words: object, name: str = "ours") -> Worker:
    """Our side: an `opd fit` that waits between optimizer steps."""
    return Worker(name, [sys.executable, HERE / "worker_fit.py", "-c", config, *words, *(f"--{word}" for word in given.set)])


def trl_worker(given: argparse.Namespace, trainer: str, python: Path, scratch: Path, pair: Any, **flags: Any) -> Worker:
    """A TRL trainer that waits between optimizer steps, in its own environment."""
    words = {
        "trainer": trainer,
        "student": pair.student,
        "teacher": pair.teacher,
        "prompts": pair.prompts,
        "scratch": scratch / trainer,
        "rows": given.rows,
        "prompt-tokens": given.prompt_tokens,
        "new-tokens": given.new_tokens,
        **flags,
    }
    return Worker(trainer, [python, HERE / "worker_trl.py", *(str(w) for k, v in words.items() for w in (f"--{k}", v))])


# ---- timing ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One timed repetition.

    Attributes:
        seconds: of the whole of it.
        others: share of the machine that other processes used meanwhile.
        phases: seconds of its parts, where they are known.
        extra: anything else that was answered.
    """

    seconds: float
    others: float
    phases: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


Side = Callable[[], Mapping[str, Any] | None]


def alternate(
    sides: Mapping[str, Side], rounds: int, warmup: int = 1, workers: Sequence[Worker] = ()
) -> dict[str, list[Sample]]:
    """Run all sides in turn, A B A B, and time each repetition.

    A side that answers with ``seconds`` (a worker) is believed; any other is timed here.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in sides}
    pids = [worker.process.pid for worker in workers]
    for turn in range(-warmup, rounds):
        for name, side in sides.items():
            load, started = Load(pids), time.perf_counter()
            got = dict(side() or {})
            seconds = float(got.pop("seconds", time.perf_counter() - started))
            sample = Sample(seconds, load.others(), got.pop("phases", {}), got)
            label = "warm-up" if turn < 0 else f"{turn + 1}/{rounds}"
            say(f"  {label:>8}  {name:<28} {seconds:9.4f} s   others {sample.others:.2f}")
            if turn >= 0:
                taken[name].append(sample)
    return taken


def undisturbed(samples: Sequence[Sample]) -> list[Sample]:
    """Repetitions with a quiet machine; if there are fewer than three, the three least disturbed."""
    quiet = [s for s in samples if not s.others >= QUIET]
    return quiet if len(quiet) >= 3 else sorted(samples, key=lambda s: s.others)[:3]


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median, least and most seconds of the undisturbed repetitions, medians of the phases, and all repetitions."""
    used = undisturbed(samples)
    seconds = [s.seconds for s in used]
    names = sorted({name for s in used for name in s.phases})
    return {
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "others": max(s.others for s in used),
        "quiet": all(not s.others >= QUIET for s in used),
        "used": len(used),
        "phases": {name: statistics.median(s.phases.get(name, 0.0) for s in used) for name in names},
        "repetitions": [asdict(s) for s in samples],
    }


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Ours over theirs, of medians."""
    return round(float(ours["median"]) / float(theirs["median"]), 4)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size), by least squares; NaN for fewer than two sizes."""
    if len(sizes) < 2:
        return math.nan
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return round(slope, 4)


# ---- results -----------------------------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers get four significant digits."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return "" if math.isnan(value) else f"{value:.4g}"

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])


def described(found: Mapping[str, Any]) -> str:
    """The machine in one line."""
    names = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    place = found.get("gpu") or f"{found['cores']} cores of {found['cpu']} ({', '.join(found['bf16']) or 'no bf16 unit'})"
    return f"{place}, {found['memory_gib']} GiB; Python {found['python']}, {names}; commit {found['commit']}."


def report(given: argparse.Namespace, name: str, ratios: Mapping[str, Any], record: Mapping[str, Any], text: str) -> None:
    """Write ``<name>.json`` and ``<name>.md``, show the text, and end with the ratios if they were asked for."""
    where = machine()
    folder = given.out or (BUILD / "quick" if given.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in vars(given).items()}
    settings = {k: v for k, v in settings.items() if k not in ("out", "peers")}  # folders of one machine
    whole = _without_nan({"benchmark": name, "machine": where, "settings": settings, "ratios": ratios, **record})
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    note = "" if not given.quick else "\n\nA quick run: the figures show that it works, nothing else."
    page = f"# {name}\n\n{described(where)}\nMade by `python benchmarks/{name}.py`.{note}\n\n{text}\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    say(f"wrote {folder / name}.json and .md")
    print(json.dumps(whole["ratios"]) if given.json else page, flush=True)


def _without_nan(value: Any) -> Any:
    """The same with null for what is not a number: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
