"""An HTTP server that answers in JSON: time-outs, retries with growing pauses, and errors that say what to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

T = TypeVar("T")
Q = TypeVar("Q")

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that is busy, starting or behind a proxy that lost it; all others stay the same when asked again."""

PAUSE = 0.5
"""Seconds before the second attempt; every later pause is twice as long, and none longer than `LONGEST_PAUSE`."""

LONGEST_PAUSE = 8.0


class Unreachable(ConnectionError):
    """Nobody answered, or only with errors that may pass."""


class Refused(ValueError):
    """The server answered, and its answer is an error that does not pass."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """One server.

    Args:
        url: with or without a trailing ``/v1``.
        timeout: seconds until an answer must have come.
        retries: attempts after the first one.
        token_variable: environment variable that holds a bearer token; it is never written anywhere. Empty or unset: none.
    """

    def __init__(self, url: str, timeout: float, retries: int, token_variable: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.token_variable = timeout, retries, token_variable
        self._local = threading.local()  # a session serves one thread

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None, self.retries)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, body, self.retries)

    def answers(self, path: str) -> bool:
        """Whether anything but an error comes back, asked once."""
        try:
            self._ask("GET", path, None, 0)
        except (Unreachable, Refused):
            return False
        return True

    def _session(self, retries: int) -> requests.Session:
        kept: dict[int, requests.Session] = self._local.__dict__.setdefault("sessions", {})
        if retries not in kept:
            session = requests.Session()
            # a proxy of the machine's environment does not know its own loopback address
            session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")
            policy = Retry(
                retries,
                backoff_factor=PAUSE,
                backoff_max=LONGEST_PAUSE,
                status_forcelist=PASSING,
                allowed_methods=None,
                raise_on_status=False,
            )
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=policy))
            kept[retries] = session
        return kept[retries]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, retries: int) -> Any:
        token = os.environ.get(self.token_variable) if self.token_variable else None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = self._session(retries).request(
                method, self.url + path, json=body, headers=headers, timeout=(min(self.timeout, 10.0), self.timeout)
            )
        except requests.RequestException as error:
            raise Unreachable(f"{self.url}{path} did not answer ({_cause(error)}; {retries + 1} attempts)") from error
        if answer.status_code in PASSING:
            raise Unreachable(f"{self.url}{path} answered {answer.status_code} {retries + 1} times: {_text(answer)}")
        if not answer.ok:
            raise Refused(f"{self.url}{path} answered {answer.status_code}: {_text(answer)}", answer.status_code)
        try:
            return answer.json() if answer.content else None
        except requests.JSONDecodeError as error:
            raise Refused(f"{self.url}{path} did not answer in JSON: {_text(answer)}", answer.status_code) from error


def _cause(error: BaseException) -> str:
    """The innermost reason, without the addresses of objects."""
    while (inner := getattr(error, "reason", None) or (error.args and error.args[0])) and isinstance(inner, BaseException):
        error = inner
    if isinstance(error, requests.Timeout) or "timed out" in str(error).lower():
        return "timed out"
    cause = error.__cause__ or error.__context__
    return str(cause if isinstance(cause, OSError) else error).rpartition(": ")[2][:200]


def _text(answer: requests.Response) -> str:
    try:
        found = answer.json()
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except requests.JSONDecodeError:
        found = answer.text
    return str(found)[:400]


def in_parallel(ask: Callable[[Q], T], questions: Sequence[Q], at_once: int) -> Iterator[tuple[Q, T]]:
    """Answers as they come. After a failure nothing new is asked, what is under way is waited for, then it is raised."""
    left = list(reversed(questions))
    running: dict[Future[T], Q] = {}
    failure: BaseException | None = None
    with ThreadPoolExecutor(at_once) as pool:
        while running or (left and failure is None):
            while left and failure is None and len(running) < at_once:
                question = left.pop()
                running[pool.submit(ask, question)] = question
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                question = running.pop(done)
                if (error := done.exception()) is not None:
                    failure = failure or error
                else:
                    yield question, done.result()
    if failure is not None:
        raise failure
