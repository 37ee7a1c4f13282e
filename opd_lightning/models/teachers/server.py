"""A teacher behind an address: vLLM, ``opd serve-teacher``, or anything else that returns ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from opd_lightning.bars import bar
from opd_lightning.endpoint import Endpoint, Refused, Unreachable, in_parallel
from opd_lightning.models.students import Student
from opd_lightning.models.teachers.base import Teacher, blind
from opd_lightning.models.teachers.law_cache import Answer, LawCache, Question, TopKLaws
from opd_lightning.models.vocabulary import Vocabulary, VocabularyMismatch
from opd_lightning.paths import cache_dir
from opd_lightning.types import Rendering

__all__ = ["ServerTeacher"]

PROBED = 48
"""Tokens of the question that is asked before training."""

SHOWN_AFTER = 2.0
"""Seconds from which asking is shown as a bar."""


class ServerTeacher(Teacher):
    """A model that somebody serves: its k likeliest tokens, their tail's mass and the drawn token are known, and no more.

    It answers over the completions API of OpenAI with vLLM's ``prompt_logprobs``: rows are sent as token ids, so the server's
    own template is never applied. Objectives that need more than is known are refused before training. Answers are kept on
    disk under a hash of model, k and tokens: other runs on the same text do not ask again. Log-probabilities are those of the
    raw logits, at temperature 1.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:8000``.
        k: likeliest tokens to ask for, at least 1; vLLM allows 20 unless it is started with more (``--max-logprobs 64``).
        model: the name under which it is served; null takes the only one.
        timeout: seconds for one answer.
        retries: further attempts for one answer, with growing pauses.
        patience: seconds that a run waits for a server that went away, before it stops and can be resumed.
        at_once: rows that are asked for at the same time.
        cache: folder of kept answers; null is ``teachers`` in ``$OPD_CACHE`` (``~/.cache/opd_lightning``), empty keeps none.
        token_variable: environment variable that holds the server's access token.

    Raises:
        ValueError: for values out of range.
    """

    writes = False

    def __init__(
        self,
        url: str,
        k: int = 20,
        model: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        patience: float = 1800.0,
        at_once: int = 8,
        cache: str | None = None,
        token_variable: str = "OPD_TEACHER_TOKEN",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"model.teacher.url={url!r}: must begin with http:// or https://")
        if k < 1 or at_once < 1 or timeout <= 0.0 or retries < 0 or patience < 0.0:
            raise ValueError(
                f"ServerTeacher(k={k}, at_once={at_once}, timeout={timeout}, retries={retries}, patience={patience}): k and "
                "at_once must be at least 1, timeout positive, retries and patience at least 0"
            )
        self.url, self.k, self.model, self.patience, self.at_once = url, k, model, patience, at_once
        self.server = Endpoint(url, timeout, retries, token_variable)
        self.folder = None if cache == "" else Path(cache).expanduser() if cache else cache_dir() / "teachers"
        self.cache: LawCache | None = None
        self.vocab = 0  # entries of the vocabulary; 0 before `meet`
        self.asked = self.kept = 0  # rows that the server scored, and rows that the disk knew
        self._at_hand: dict[Question, Answer] = {}

    @property
    def known(self) -> int:
        return self.k

    def processor(self, student: Student) -> Any:
        raise blind(self)

    # ---- before training -----------------------------------------------------------------------------------------------
    def meet(self, vocabulary: Vocabulary) -> None:
        """Ask for the model, its tokens and a law.

        Raises:
            ValueError: for a server that is away, serves another model or cannot tell what is needed, with what to change.
            VocabularyMismatch: for another tokenizer.
        """
        try:
            card = self._card(self.server.get("/v1/models"))
            self.model = str(card["id"])
            self.vocab = vocabulary.size
            step = max(1, (vocabulary.size - 1) // (PROBED - 1))
            probe = Question(tuple(dict.fromkeys([*range(0, vocabulary.size, step), vocabulary.size - 1])), 1)
            places = self._places(probe)
        except Unreachable as error:
            raise ValueError(
                f"the teacher server is not there: {error}. Start it, or correct model.teacher.url={self.url!r}"
            ) from error
        self._prove_tokens(vocabulary, probe, places)
        answer = self._answer(probe, places)
        mass = answer.logprobs.exp().sum(-1)
        if float(answer.logprobs.max()) > 1e-3 or float(mass.max()) > 1.01:
            raise ValueError(
                f"the server {self.url} does not return log-probabilities (the largest is {float(answer.logprobs.max()):.3g}, "
                f"{self.k} of them sum to {float(mass.max()):.3g} in probability): start vLLM with --logprobs-mode raw_logprobs"
            )
        if self.folder is not None:
            identity = f"{self.model} root={card.get('root')} k={self.k} vocabulary={vocabulary.size}"
            self.cache = LawCache(self.folder, identity, answer)
        where = f", answers kept in {self.cache.folder}" if self.cache else ""
        rank_zero_info(f"teacher server {self.url}: {self.model}, top {self.k}{where}")

    def _card(self, found: Any) -> dict[str, Any]:
        cards = {str(card["id"]): card for card in found.get("data", [])} if isinstance(found, dict) else {}
        names = ", ".join(cards) or "none"
        if self.model is not None and self.model not in cards:
            raise ValueError(f"model.teacher.model={self.model!r} is not served at {self.url}; served there: {names}")
        if self.model is None and len(cards) != 1:
            raise ValueError(f"{self.url} serves {len(cards)} models ({names}): say which in model.teacher.model")
        card: dict[str, Any] = cards[self.model or next(iter(cards))]
        return card

    def _prove_tokens(self, vocabulary: Vocabulary, probe: Question, places: Sequence[dict[str, Any]]) -> None:
        """The server names every token that it was sent; each must be what the student's tokenizer calls it."""
        differing = []
        for token, place in zip(probe.ids[1:], places, strict=True):
            ours = str(vocabulary.tokenizer.decode([token]))
            theirs = place.get(str(token), {}).get("decoded_token")
            if theirs is not None and "\ufffd" not in f"{ours}{theirs}" and ours.strip() != theirs.strip():
                differing.append(f"    id {token}: student {ours!r}, server {theirs!r}")
        if differing:
            shown = "\n".join(differing[:5])
            raise VocabularyMismatch(
                f"the student and the server {self.url} use different tokenizers: {len(differing)} of {len(places)} ids "
                f"differ, for example\n{shown}\n  Serve a model of the student's family (model.teacher.url)."
            )

    # ---- asking --------------------------------------------------------------------------------------------------------
    def prepare(self, text: Rendering) -> None:
        """Have the answers to all rows of a refresh at hand.

        Raises:
            Unreachable: if the server is away. What it said before is kept.
        """
        before, self._at_hand = self._at_hand, {}
        missing = []
        for question in dict.fromkeys(_questions(text)):
            if (found := before.get(question) or self._from_disk(question)) is not None:
                self._at_hand[question] = found
            else:
                missing.append(question)
        with bar(total=len(missing), desc=f"asking {self.model}", unit="row", delay=SHOWN_AFTER) as shown:
            for question, answer in in_parallel(self._ask, missing, self.at_once):
                self._at_hand[question] = answer
                self.asked += 1
                if self.cache is not None:
                    self.cache.put(question.key(), answer)
                shown.update()

    def _from_disk(self, question: Question) -> Answer | None:
        found = self.cache.get(question) if self.cache is not None else None
        self.kept += found is not None
        return found

    @torch.no_grad()
    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TopKLaws:
        questions = _questions(text)
        if any(q not in self._at_hand for q in questions):  # text that no refresh wrote: an evaluation
            kept = self._at_hand
            self.prepare(text)
            self._at_hand |= kept
        answers = [self._at_hand[q] for q in questions]
        parameter = next(student.parameters())
        dtype = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
        empty = Answer(torch.zeros(0, self.k), torch.zeros(0, self.k), torch.zeros(0))
        ids, top, drawn = (torch.cat(column).to(text.ids.device) for column in zip(*(answers or [empty]), strict=True))
        return TopKLaws(ids.long(), top.to(dtype), text.targets[text.mask], drawn.to(dtype), vocab)

    def _ask(self, question: Question) -> Answer:
        return self._answer(question, self._places(question))

    def _places(self, question: Question) -> list[dict[str, Any]]:
        """What the server says about the completion tokens: token id to log-probability and rank."""
        body = {
            "model": self.model,
            "prompt": list(question.ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k,
        }
        try:
            found = self.server.post("/v1/completions", body)
        except Refused as error:
            raise ValueError(
                f"the teacher server refuses a row of {len(question.ids)} tokens with prompt_logprobs={self.k}: {error}\n"
                f"  It must serve at least that many tokens and log-probabilities (vLLM: --max-model-len, --max-logprobs "
                f"{self.k}), and every id of the student's vocabulary."
            ) from error
        choices = found.get("choices") if isinstance(found, dict) else None
        places = choices[0].get("prompt_logprobs") if choices else None
        if not places or len(places) != len(question.ids):
            raise ValueError(
                f"{self.url} returned no prompt_logprobs: it cannot be a teacher. vLLM and `opd serve-teacher` return them"
            )
        return list(places[question.start :])

    def _answer(self, question: Question, places: Sequence[dict[str, Any]]) -> Answer:
        k = min(self.k, self.vocab)
        rows = [sorted(((e["logprob"], int(i)) for i, e in place.items()), reverse=True)[:k] for place in places]
        if (fewest := min(map(len, rows), default=k)) < k:
            raise ValueError(
                f"{self.url} told {fewest} of the {k} likeliest tokens asked for: lower model.teacher.k, or raise the server's "
                f"limit (vLLM: --max-logprobs {k})"
            )
        drawn = [p[str(token)]["logprob"] for token, p in zip(question.ids[question.start :], places, strict=True)]
        wide = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), k, 2)  # whole numbers stay whole
        return Answer(wide[..., 1].int(), wide[..., 0].float(), torch.tensor(drawn, dtype=torch.float32))


def _questions(text: Rendering) -> list[Question]:
    """The rows that have a token to be scored. Completion tokens lie together."""
    out = []
    rows: tuple[Tensor, ...] = (text.ids.cpu(), text.lengths.cpu(), text.mask.cpu())
    for ids, length, mask in zip(*rows, strict=True):
        if bool(mask.any()):
            out.append(Question(tuple(ids[: int(length)].tolist()), int(mask.int().argmax()) + 1))
    return out
