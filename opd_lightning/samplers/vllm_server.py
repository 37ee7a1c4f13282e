"""A vLLM server on this machine: started in an environment of its own, asked over loopback, given new weights by path."""

from __future__ import annotations

import atexit
import copy
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor

from opd_lightning import parallel
from opd_lightning.endpoint import Endpoint, Refused, Unreachable, in_parallel

NAME = "student"
STARTS_WITHIN = 600.0
"""Seconds; a compiled vLLM took 58 s on two cores, a large model on a slow disk takes minutes."""


class EngineError(RuntimeError):
    """The engine is not there, or does not do what it must; the message says what to change."""


class Row(NamedTuple):
    """What the engine wrote behind one prompt: tokens, and the log-probability of each under the law that drew it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def write_folder(folder: Path, base: Any, tokenizer: Any, state: dict[str, Tensor]) -> Path:
    """A Hugging Face folder of a model. It appears whole or not at all.

    A head that is tied to the embedding is written apart from it: on the CPU, vLLM 0.32 packs the head once, and a reload of
    the embedding would not reach it.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = copy.deepcopy(base.config)
    config.architectures = [parallel.plain_class(base).__name__]  # a model that was made from nothing has none
    config.tie_word_embeddings = False
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    first = {t.data_ptr(): n for n, t in reversed(state.items())}
    apart = {n: t if first[t.data_ptr()] == n else t.clone() for n, t in state.items()}
    save_file({n: t.contiguous().cpu() for n, t in apart.items()}, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


class VLLMServer:
    """One server that holds the student.

    Args:
        url: of a server that runs already.
        folder: where weights are handed over; the server must see it under the same path.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.server = Endpoint(url, timeout=STARTS_WITHIN, retries=2)
        self.name = NAME

    # ---- starting ------------------------------------------------------------------------------------------------------
    @classmethod
    def started(cls, python: str, model: Path, dtype: str, options: Sequence[str]) -> VLLMServer:
        """Start vLLM in the environment of a python, and wait until it answers. It ends with this process.

        Raises:
            EngineError: if it ends instead, with the end of its log.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [
            str(Path(python).expanduser()),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            NAME,
        ]
        words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
        words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", *options]
        log = model.parent / "vllm.log"
        rank_zero_info(f"starting vLLM at port {port} (log: {log})")
        # new weights come through /collective_rpc, which exists in this mode alone
        env = _environment() | {"VLLM_SERVER_DEV_MODE": "1"}
        with log.open("ab") as out:
            process = subprocess.Popen(
                words, stdout=out, stderr=out, env=env, cwd=model.parent, start_new_session=True, preexec_fn=_ends_with_parent()
            )
        atexit.register(_end, process)
        found = cls(f"http://127.0.0.1:{port}", model.parent)
        deadline = time.monotonic() + STARTS_WITHIN
        while not found.server.answers("/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                _end(process)
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
                raise EngineError(f"vLLM did not start ({' '.join(words)}); the end of {log}:\n{tail}")
            time.sleep(0.5)
        return found

    def meet(self) -> None:
        """Take the name under which the student is served.

        Raises:
            EngineError: if nobody is there, or several models are.
        """
        try:
            names = [str(card["id"]) for card in self.server.get("/v1/models")["data"]]
        except (Unreachable, Refused, KeyError, TypeError) as error:
            raise EngineError(f"no vLLM server at rollout.sampler.url={self.url!r}: {error}") from error
        if len(names) != 1:
            raise EngineError(f"{self.url} serves {len(names)} models ({', '.join(names)}); it must serve the student alone")
        self.name = names[0]

    # ---- weights -------------------------------------------------------------------------------------------------------
    def load(self, folder: Path) -> None:
        """Take the weights of a folder, and forget what was computed with the old ones.

        Raises:
            EngineError: if the server cannot.
        """
        try:
            self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            done = self.server.post("/reset_prefix_cache", {})
        except (Unreachable, Refused) as error:
            raise EngineError(
                f"vLLM did not take the new weights: {error}\n  It must be started with VLLM_SERVER_DEV_MODE=1 and see {folder}"
            ) from error
        if isinstance(done, dict) and not done.get("success", True):
            raise EngineError(f"vLLM kept its prefix cache, which belongs to the old weights: {done}")

    # ---- reading and writing -------------------------------------------------------------------------------------------
    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, as the engine sees them now."""
        body = {"model": self.name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        places = self._post(body)["prompt_logprobs"]
        return [float(place[str(token)]["logprob"]) for token, place in zip(ids[1:], places[1:], strict=True)]

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
        settings: dict[str, Any],
        at_once: int,
        done: Callable[[int], None],
    ) -> list[Row]:
        """Continue every prompt, each with a seed of its own; ``done`` hears how many are written."""
        common = {"model": self.name, "logprobs": 0, "return_token_ids": True, **settings}

        def ask(i: int) -> Row:
            choice = self._post({**common, "prompt": list(prompts[i]), "seed": seeds[i] % 2**31})
            ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
            if ids is None or logprobs is None or len(ids) != len(logprobs):
                raise EngineError(f"{self.url} returned no token ids or log-probabilities: vLLM 0.10.2 or newer is needed")
            return Row(tuple(ids), tuple(logprobs))

        rows: dict[int, Row] = {}
        for i, row in in_parallel(ask, range(len(prompts)), at_once):
            rows[i] = row
            done(len(rows))
        return [rows[i] for i in range(len(prompts))]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            choice: dict[str, Any] = self.server.post("/v1/completions", body)["choices"][0]
        except Refused as error:
            raise EngineError(
                f"vLLM refuses a prompt of {len(body['prompt'])} tokens: {error} (raise its --max-model-len, or lower "
                "rollout.sampler.max_new_tokens)"
            ) from error
        except Unreachable as error:
            raise EngineError(f"vLLM went away: {error}. The run resumes with --ckpt_path last") from error
        return choice


def lacks_vllm(python: str) -> str:
    """Why an interpreter cannot run vLLM, empty if it can. Nothing is imported: that takes vLLM many seconds."""
    words = [str(Path(python).expanduser()), "-c", "from importlib.util import find_spec; print(find_spec('vllm') is not None)"]
    try:
        asked = subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if asked.returncode:
        return f"is no Python ({(asked.stderr or asked.stdout).strip()[-200:] or f'exit code {asked.returncode}'})"
    return "" if asked.stdout.strip() == "True" else "has no package vllm"


def _environment() -> dict[str, str]:
    """Without what would make another interpreter import this environment's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def shared_folder() -> Path:
    """A folder for weights that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="opd-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _ends_with_parent() -> Callable[[], object] | None:
    """On Linux the kernel ends the server when this process is killed outright."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(parent_death_signal, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
