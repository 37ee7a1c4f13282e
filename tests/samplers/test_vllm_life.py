"""The engine that a run owns: proven to be there before weights are loaded, shared by ranks, and ended with the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opd_lightning.callbacks import RolloutRefresh
from opd_lightning.callbacks.recovery import checkpoints
from opd_lightning.samplers import VLLMSampler
from opd_lightning.samplers.vllm_server import EngineError
from tests.helpers import tiny_data, tiny_module, tiny_trainer
from tests.samplers.test_vllm import OPTIONS, URL, wide
from tests.strategies.test_splits import two_processes

__all__ = ["wide"]
STEPS = 6
CONFIG = """
seed_everything: 4
trainer:
  max_steps: {steps}
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{{class_path: OPDCheckpoint, init_args: {{every_n_steps: 1}}}}]
model:
  student: {{path: {student}, lora: {{r: 4}}}}
  teacher: {{class_path: FrozenTeacher, init_args: {{path: {teacher}}}}}
  objective: {{class_path: Objective, init_args: {{divergence: ReverseKL, support: SampledToken, correction: TruncatedRatio}}}}
  optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-3}}}}
data:
  prompts: {{class_path: TaskPrompts, init_args: {{task: {{class_path: Addition, init_args: {{digits: 2}}}}, size: 60}}}}
  held_out: 8
  batch_size: 8
rollout:
  every_n_steps: 2
  sampler: {{class_path: VLLMSampler, init_args: {{python: {python}, folder: {folder}, options: {options}, max_new_tokens: 8}}}}
eval: {{every_n_steps: 0, sampler: {{max_new_tokens: 8}}}}
"""


@pytest.mark.parametrize(
    ("python", "says"),
    [
        (sys._base_executable, "has no package vllm"),  # type: ignore[attr-defined]
        ("/bin/false", "is no Python"),
        (__file__, "does not run"),
    ],
)
def test_an_interpreter_without_vllm_is_refused_first(python: str, says: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    module = tiny_module(pair)
    with pytest.raises(ValueError, match=rf"rollout\.sampler\.python=.* {says}.*interpreter of an environment with vLLM"):
        tiny_trainer(tmp_path, [RolloutRefresh(sampler=VLLMSampler(python=python))]).fit(module, tiny_data())
    assert module.student is None  # nothing was loaded


def test_an_address_without_a_server_is_refused_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    module = tiny_module(pair)
    with pytest.raises(EngineError, match=r"no vLLM server at rollout\.sampler\.url"):
        tiny_trainer(tmp_path, [RolloutRefresh(sampler=VLLMSampler(url=URL))]).fit(module, tiny_data())
    assert module.student is None


def engine() -> str:
    for key, value in (
        ("KVCACHE_SPACE", "1"),
        ("NUM_OF_RESERVED_CPU", "0"),
        ("OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}"),
    ):
        os.environ.setdefault(f"VLLM_CPU_{key}", value)
    return os.environ.get("VLLM_PYTHON", "")


def children(folder: Path) -> list[int]:
    """Processes of engines that were given a folder, and theirs."""
    parents, roots = {}, set()
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if str(folder) in words and "api_server" in words:
            roots.add(int(entry.name))
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fit(root: Path, config: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "opd_lightning", "fit", "-c", str(config), "--trainer.default_root_dir", str(root), *more]
    out = (root.parent / f"{root.name}.log").open("a")
    return subprocess.Popen(words, stdout=out, stderr=out, text=True)


@pytest.mark.vllm
def test_a_killed_run_takes_its_engine_with_it_and_resumes(wide: tuple[Path, Path], tmp_path: Path) -> None:
    hand = tmp_path / "hand"
    given = {"student": wide[0], "teacher": wide[1], "python": engine(), "folder": hand, "options": OPTIONS, "steps": STEPS}
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(**given))
    straight = fit(tmp_path / "straight", config)
    assert straight.wait(500) == 0, (tmp_path / "straight.log").read_text()[-3000:]
    assert not children(hand)  # ended with the run
    killed = fit(tmp_path / "killed", config)
    deadline = time.monotonic() + 500
    while (
        not checkpoints(tmp_path / "killed/checkpoints") or checkpoints(tmp_path / "killed/checkpoints")[0].stem < "step-000003"
    ):
        assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    engines = children(hand)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert engines
    for _ in range(300):
        if not any(map(alive, engines)):
            break
        time.sleep(0.1)
    assert not [pid for pid in engines if alive(pid)]
    again = fit(tmp_path / "killed", config, "--ckpt_path", "last")
    assert again.wait(500) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    said = (tmp_path / "killed.log").read_text()
    assert len(re.findall("vLLM agrees with the trainer to", said)) == 2  # both engines were proven
    ends = [checkpoints(tmp_path / name / "checkpoints")[0] for name in ("straight", "killed")]
    assert [end.stem for end in ends] == [f"step-{STEPS:06d}"] * 2
    weights = [torch.load(end, weights_only=True)["state_dict"] for end in ends]
    largest = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
    print("\nlargest difference of a weight after resuming:", largest)
    assert largest < 1e-5


@pytest.mark.vllm
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_one_engine(strategy: str, wide: tuple[Path, Path], tmp_path: Path) -> None:
    engine()
    case = f"{strategy}:vllm"
    two_processes("tests/strategies/ranks_run.py", tmp_path, *wide, os.environ["VLLM_PYTHON"], case, timeout=500)
    found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
    print("\ndrift", found["drift"], "losses", found["losses"])
    assert len(found["drift"]) == 6 and max(found["drift"]) < 1e-3  # two micro-batches a step, from the second step on
    assert len(found["rollouts"]) == 32 and len(found["losses"]) == 4
