"""Rollouts by vLLM, with proof after every refresh that it holds the weights that are trained."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from opd_lightning import parallel
from opd_lightning.media import Media
from opd_lightning.models.lora import base_of, plain_state
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.samplers.native import NativeSampler
from opd_lightning.samplers.vllm_server import EngineError, VLLMServer, lacks_vllm, shared_folder, write_folder
from opd_lightning.types import NOT_A_STUDENT, Completion

__all__ = ["VLLMSampler"]

CANARY = 48
"""Tokens of the fixed text that trainer and engine both score."""

DRIFT = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Largest mean difference, nats, between the two scores. vLLM 0.32 on the CPU in float32: 2e-7 on a tiny model, 1e-5 on
SmolLM2-135M; narrower types were not measured."""

NOISE = 1e-5
"""Mean change of the trainer's own scores, nats, below which an update cannot be told from rounding."""


class VLLMSampler(NativeSampler):
    """Completions written by vLLM, a child process on the run's device or a server, with the weights of every refresh.

    The recorded log-probabilities are the engine's own: the gap to the trainer's shows as `train/ratio_deviation`, and
    `objective.correction` (`TruncatedRatio`) is there for it. After every refresh both score one fixed text. Where they differ
    by more than ``max_drift``, or the engine agrees better with the weights of the refresh before, the run ends: a stale engine
    would train on text of another student without a sign. Evaluations and text of a teacher are written by the native sampler.

    Args:
        python: interpreter of an environment with vLLM, which the run starts there and which ends with it; it may hold other
            versions of torch and transformers. Several ranks share one engine.
        url: of a server that runs already, with the student's architecture, ``VLLM_SERVER_DEV_MODE=1`` and
            ``--logprobs-mode processed_logprobs``.
        folder: where weights are handed over; a server on another machine must see it under this path. null is a temporary one.
        options: further words for a server that the run starts, e.g. ``[--max-model-len, "2048", --enforce-eager]``.
        temperature: divides the logits before sampling.
        top_p: sample from the smallest set of tokens with at least this mass; 1 keeps all.
        top_k: sample from this many likeliest tokens; 0 keeps all.
        max_new_tokens: longest completion.
        batch_size: rows that are asked for at the same time.
        max_drift: nats; null is 0.01 for float32 weights and 0.1 for narrower ones.

    Raises:
        ValueError: unless exactly one of ``python`` and ``url`` is given, or for a value out of range.
    """

    foreign = True

    def __init__(
        self,
        python: str | None = None,
        url: str | None = None,
        folder: str | None = None,
        options: list[str] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        max_drift: float | None = None,
    ) -> None:
        super().__init__(temperature, top_p, top_k, max_new_tokens, batch_size)
        if (python is None) == (url is None):
            raise ValueError(
                "rollout.sampler: VLLMSampler takes one of two: `python` (of an environment with vLLM, such as "
                "/opt/vllm/bin/python), or `url` (of a server that runs already)"
            )
        if python is not None and not Path(python).expanduser().is_file():
            raise ValueError(f"rollout.sampler.python={python!r}: there is no such interpreter")
        if max_drift is not None and max_drift <= 0.0:
            raise ValueError(f"rollout.sampler.max_drift={max_drift}: must be positive")
        self.python, self.url, self.folder, self.options, self.max_drift = python, url, folder, options or [], max_drift
        self.server: VLLMServer | None = None
        self._held: tuple[weakref.ref[nn.Module], int] | None = None  # the model and step whose weights the engine has
        self._before: Tensor | None = None  # the trainer's canary before the last hand-over
        self._now: Tensor | None = None

    def check(self) -> None:
        """Raises:
        ValueError: for an interpreter without vLLM.
        EngineError: if there is no server at the address, or one of several models.
        """
        if self.url is not None:
            VLLMServer(self.url, Path()).meet()
        elif self.python is not None and (problem := lacks_vllm(self.python)):
            raise ValueError(
                f"rollout.sampler.python={self.python!r} {problem}: give the interpreter of an environment with vLLM "
                "(`python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm` makes one with an NVIDIA GPU)"
            )

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        vocabulary: Vocabulary,
        policy_step: int,
        on_progress: Callable[[int], None] | None = None,
        media: Sequence[Media | None] = (),
    ) -> list[Completion]:
        if policy_step == NOT_A_STUDENT:
            return super().write(model, prompts, seeds, vocabulary, policy_step, on_progress, media)
        if any(m is not None for m in media):
            raise ValueError("a prompt holds an image, which vLLM is not handed here: take rollout.sampler: NativeSampler")
        server = self._refresh(base_of(model), vocabulary, policy_step)
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": list(vocabulary.eos_ids),
        }
        config: Any = base_of(model).config
        if padding := range(vocabulary.size, config.get_text_config().vocab_size):
            settings["logit_bias"] = {str(i): -100.0 for i in padding}
        done = on_progress or (lambda finished: None)
        rows = server.write([tuple(p) for p in prompts], seeds, settings, self.batch_size, done)
        certain = self.temperature == 0.0  # the likeliest token is drawn with probability 1
        return [
            Completion(r.ids, (0.0,) * len(r.ids) if certain else r.logprobs, r.ids[-1] in vocabulary.eos_ids, policy_step)
            for r in rows
        ]

    # ---- weights -------------------------------------------------------------------------------------------------------
    def _refresh(self, base: Any, vocabulary: Vocabulary, step: int) -> VLLMServer:
        """The server with the weights of this moment. All ranks call it; the first one hands the weights over."""
        text = [(7 * i + 3) % vocabulary.size for i in range(CANARY)]
        current = scores(base, text)
        problem = ""
        if parallel.rank() == 0:
            try:
                self._hand_over(base, vocabulary, step)
            except EngineError as error:
                problem = str(error)
        problem, url = parallel.gather_objects((problem, self.server.url if self.server else ""))[0]
        if problem:
            raise EngineError(problem)
        if self.server is None:  # the first rank started it, or found it
            self.server = VLLMServer(url, Path())
            self.server.meet()
        if not self._holds(base, step):
            self._held, self._before, self._now = (weakref.ref(base), step), self._now, current
        self._compare(torch.tensor(self.server.score(text), dtype=torch.float64), current, next(base.parameters()).dtype)
        return self.server

    def _hand_over(self, base: Any, vocabulary: Vocabulary, step: int) -> None:
        folder = Path(self.folder).expanduser().resolve() if self.folder else None
        if self.server is None and self.python is not None:
            target = write_folder((folder or shared_folder()) / "start", base, vocabulary.tokenizer, plain_state(base))
            dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
            self.server = VLLMServer.started(self.python, target, dtype, self.options)
            return
        if self.server is None:
            self.server = VLLMServer(str(self.url), folder or shared_folder())
            self.server.meet()
        if not self._holds(base, step):
            self.give(self.server, base, vocabulary)

    def _holds(self, base: Any, step: int) -> bool:
        return self._held is not None and self._held[0]() is base and self._held[1] == step

    def give(self, server: VLLMServer, base: Any, vocabulary: Vocabulary) -> None:
        """Write the weights, adapters merged, and have the engine read them."""
        server.load(write_folder(server.folder / "weights", base, vocabulary.tokenizer, plain_state(base)))

    # ---- proof ---------------------------------------------------------------------------------------------------------
    def _compare(self, seen: Tensor, current: Tensor, dtype: torch.dtype) -> None:
        """Raises:
        EngineError: if the engine, by its scores of the fixed text, does not hold the weights that are trained.
        """
        drift, allowed = float((seen - current).abs().mean()), self.max_drift or DRIFT[dtype]
        self.measured = {"rollout/engine_drift": drift}
        stale = moved = None
        if self._before is not None:
            moved, stale = (float((self._before - x).abs().mean()) for x in (current, seen))
        if moved is not None and stale is not None and moved > NOISE and stale < 0.5 * drift:
            raise EngineError(
                f"vLLM writes with the weights of the refresh before: its log-probabilities of a fixed text differ by "
                f"{stale:.2g} nats from the student's then and by {drift:.2g} from the student's now (the update moved them by "
                f"{moved:.2g}). The new weights did not reach it"
            )
        if drift > allowed:
            raise EngineError(
                f"vLLM and the trainer disagree on a fixed text by {drift:.3g} nats a token (rollout.sampler.max_drift allows "
                f"{allowed:g}): it holds other weights, or another precision (its --dtype)"
            )
        if self._before is None:
            rank_zero_info(f"vLLM agrees with the trainer to {drift:.2g} nats a token on a fixed text")


def scores(base: Any, text: Sequence[int]) -> Tensor:
    """(len - 1,) the trainer's log-probabilities of all tokens but the first, float64, over all rows of the head."""
    ids = torch.tensor([text], device=next(base.parameters()).device)
    law = base(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    found: Tensor = law.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    return found
