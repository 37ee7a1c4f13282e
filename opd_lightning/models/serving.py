"""A model behind an address: an OpenAI-compatible server that scores rows and returns the likeliest tokens of every law.

It speaks as much of vLLM's completions API as `ServerTeacher` needs, on the standard library's server: for a teacher on another
machine, or in another process, where vLLM is not at hand. It does not write text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from opd_lightning.models.distributions import laws_of, prove_head
from opd_lightning.models.loading import load_config, load_model, load_tokenizer
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.ops.logprobs import log_softmax
from opd_lightning.types import Rendering

RANKED = 256
"""Laws that are ranked at once."""

ABOUT = """Serves a model as a teacher: its likeliest next tokens at every place of a row, over HTTP as vLLM answers them
(/v1/completions with prompt_logprobs). For a teacher in another process or on another machine; it does not write text.
A run names it with

  model:
    teacher: {class_path: ServerTeacher, init_args: {url: "http://127.0.0.1:8000", k: 20}}"""


class BadRequest(ValueError):
    """What was asked cannot be answered; the client is told why."""


class Scorer:
    """A causal language model that scores rows of token ids, one at a time.

    Args:
        path: as `FrozenTeacher` takes it.
        name: under which it is served.
        dtype: of the weights.
        max_logprobs: most entries of a law that may be asked for.
    """

    def __init__(self, path: str, name: str, dtype: str = "float32", max_logprobs: int = 64) -> None:
        self.path, self.name, self.max_logprobs = path, name, max_logprobs
        self.model: Any = load_model(path, dtype).eval().requires_grad_(False)
        prove_head(self.model)
        self.vocabulary = Vocabulary.of(load_tokenizer(path))
        self.longest = int(getattr(load_config(path).get_text_config(), "max_position_embeddings", 0) or 2**31)
        self._one = threading.Lock()

    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "root": self.path, "max_model_len": self.longest}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request for a completion of one token with ``prompt_logprobs``.

        Raises:
            BadRequest: for anything that it cannot do.
        """
        prompt, k = body.get("prompt"), body.get("prompt_logprobs")
        rows = [prompt] if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else prompt
        if body.get("model") not in (None, self.name):
            raise BadRequest(f"the model {body.get('model')!r} does not exist here; this is {self.name!r}")
        if not isinstance(rows, list) or not all(isinstance(r, list) and all(isinstance(i, int) for i in r) for r in rows):
            raise BadRequest("prompt must be a list of token ids, or several: this server does not tokenize text")
        if not isinstance(k, int) or not 0 <= k <= self.max_logprobs:
            raise BadRequest(
                f"prompt_logprobs={k}: this server answers 0 to {self.max_logprobs} (opd serve-teacher --max-logprobs)"
            )
        if body.get("max_tokens", 16) > 1 or body.get("stream"):
            raise BadRequest("max_tokens must be 1, without streaming: this server scores rows and does not write text")
        for row in rows:
            if not 2 <= len(row) < self.longest or min(row) < 0 or max(row) >= self.vocabulary.size:
                raise BadRequest(
                    f"a row of {len(row)} tokens, ids {min(row, default=0)} to {max(row, default=0)}: needs 2 to "
                    f"{self.longest - 1} tokens with ids below {self.vocabulary.size}"
                )
        choices = [{"index": i, **self._score(row, k)} for i, row in enumerate(rows)]
        return {"id": f"score-{time.time_ns()}", "object": "text_completion", "model": self.name, "choices": choices}

    @torch.no_grad()
    def _score(self, row: list[int], k: int) -> dict[str, Any]:
        text = Rendering.of([row[:1]], [[*row[1:], row[0]]], self.vocabulary.pad_id)  # the last law is that of the new token
        device = next(self.model.parameters()).device
        with self._one:
            laws = laws_of(self.model, text.map(lambda x: x.to(device)), self.vocabulary.size)
            places: list[Any] = [None]
            newest = 0
            for start in range(0, len(row), RANKED):
                law = log_softmax(laws.logits(start, min(start + RANKED, len(row))).float())
                best = law.topk(min(k, law.shape[1]), -1)
                scored = row[start + 1 : start + 1 + len(law)]
                ids = torch.tensor(scored, device=law.device)[:, None]
                drawn = law[: len(scored)].gather(-1, ids)
                ranks = (law[: len(scored)] > drawn).sum(-1).tolist()
                for t, token in enumerate(scored):
                    entries = dict(zip(best.indices[t].tolist(), best.values[t].tolist(), strict=True))
                    found = {i: self._entry(i, x, rank) for rank, (i, x) in enumerate(entries.items(), 1)}
                    found.setdefault(token, self._entry(token, float(drawn[t]), ranks[t] + 1))
                    places.append({str(i): entry for i, entry in found.items()})
                newest = int(law[-1].argmax())
        end = newest in self.vocabulary.eos_ids
        return {
            "text": self.vocabulary.decode([newest]),
            "token_ids": [newest],
            "finish_reason": "stop" if end else "length",
            "prompt_logprobs": places,
        }

    def _entry(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": str(self.vocabulary.tokenizer.decode([token]))}


class _Handler(BaseHTTPRequestHandler):
    """Routes of one `Scorer`, which its server carries."""

    protocol_version = "HTTP/1.1"
    server: ScoringServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {})
        elif self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [self.server.scorer.card()]})
        else:
            self._error(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/completions":
            return self._error(404, f"no such path: {self.path}; this server has /v1/models and /v1/completions")
        try:
            return self._answer(200, self.server.scorer.complete(json.loads(raw)))
        except (BadRequest, json.JSONDecodeError) as error:
            return self._error(400, str(error))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
            self.wfile.write(raw)

    def _error(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"message": message, "code": status}})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a row would bury what matters."""


class ScoringServer(ThreadingHTTPServer):
    """A `Scorer` at an address.

    Args:
        scorer: what is served.
        host: address to listen at; anything but loopback lets other machines in, and there is no password.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, scorer: Scorer, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.scorer = scorer
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


def main(words: list[str]) -> int:
    """``opd serve-teacher``: serve until Ctrl-C."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("opd serve-teacher", description=ABOUT, formatter_class=layout)
    parser.add_argument("path", help="a folder, a hub name, a .gguf file, zoo/<task>/<model>, package:<module>/<file>")
    parser.add_argument("--name", help="under which it is served (default: the path)")
    parser.add_argument("--host", default="127.0.0.1", help="anything else lets other machines in, without a password")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--max-logprobs", type=int, default=64, help="most entries of a law (default: %(default)s)")
    given = parser.parse_args(words)
    scorer = Scorer(given.path, given.name or given.path, given.dtype, given.max_logprobs)
    with ScoringServer(scorer, given.host, given.port) as server:
        print(f"serving {scorer.name} at {server.url}: top {scorer.max_logprobs}; stop with Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
