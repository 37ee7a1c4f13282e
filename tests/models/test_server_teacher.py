"""Teachers behind an address: a real tiny model behind a real socket, and what happens when it is wrong, slow or gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opd_lightning.callbacks import AgreementMonitor, CompletionEval, OPDCheckpoint, RolloutRefresh
from opd_lightning.callbacks.asking import TeacherAway
from opd_lightning.endpoint import Endpoint, Refused, Unreachable
from opd_lightning.models import EnsembleTeacher, FrozenTeacher, RoutedTeacher, ServerTeacher, Teacher, VocabularyMismatch
from opd_lightning.models.serving import Scorer, ScoringServer
from opd_lightning.models.tiny import save_tiny
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.objectives import ForwardKL, Objective, ReverseKL, SampledToken, TopK
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Completion, Prompt, Rendering, Rollout
from tests.helpers import same, tiny_data, tiny_module, tiny_trainer, weights

Pair = tuple[Path, Path]
COARSE = Objective(ReverseKL(), TopK(6, "teacher", "tail"))


class Breakable(ScoringServer):
    """The server, with faults that a real one has: it can be slow, and forget how to answer."""

    def __init__(self, scorer: Scorer, port: int = 0) -> None:
        super().__init__(scorer, port=port)
        self.delays: list[float] = []
        self.spoil: Callable[[dict[str, Any]], None] = lambda answer: None
        self.requests = 0
        plain = scorer.complete

        def complete(body: dict[str, Any]) -> dict[str, Any]:
            self.requests += 1
            time.sleep(self.delays.pop(0) if self.delays else 0.0)
            answer = plain(body)
            self.spoil(answer)
            return answer

        self.scorer = type("Spoilt", (), {"complete": staticmethod(complete), "card": staticmethod(scorer.card)})()


@contextmanager
def running(scorer: Scorer, port: int = 0) -> Iterator[Breakable]:
    server = Breakable(scorer, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def scorer(pair: Pair) -> Scorer:
    return Scorer(str(pair[1]), "tiny", max_logprobs=8)


@pytest.fixture
def server(scorer: Scorer) -> Iterator[Breakable]:
    with running(scorer) as found:
        yield found


def fit(pair: Pair, root: Path, teacher: Teacher, objective: Objective = COARSE, *more: Any, **kwargs: Any) -> Any:
    pl.seed_everything(3, verbose=False)
    module = tiny_module(pair, objective, teacher=teacher)
    callbacks = [CompletionEval(every_n_steps=2, sampler=NativeSampler(max_new_tokens=6), seed=5), AgreementMonitor(k=4), *more]
    trainer = tiny_trainer(root, callbacks)
    trainer.fit(module, tiny_data(), **kwargs)
    return module, {k: float(v) for k, v in trainer.callback_metrics.items()}


# ---- equality ----------------------------------------------------------------------------------------------------------
def test_values_and_gradients_are_those_of_the_local_teacher(pair: Pair, server: Breakable, tmp_path: Path) -> None:
    vocabulary = Vocabulary.of(FrozenTeacher(str(pair[1])).tokenizer())
    there, here = ServerTeacher(server.url, k=6, cache=str(tmp_path)), FrozenTeacher(str(pair[1]))
    there.meet(vocabulary)
    draw = torch.Generator().manual_seed(1)
    sizes = [(3, 5), (6, 1), (1, 9), (4, 4)]
    rows = [torch.randint(0, vocabulary.size, (a + b,), generator=draw).tolist() for a, b in sizes]
    prompts = [Prompt(i, "", tuple(row[:a]), row=i) for i, (row, (a, _)) in enumerate(zip(rows, sizes, strict=True))]
    texts = [Completion(tuple(row[a:]), (-2.5,) * b, True, 0) for row, (a, b) in zip(rows, sizes, strict=True)]
    rollout = Rollout.of(prompts, texts, vocabulary.pad_id).without(torch.tensor([False, False, False, True]))
    module = tiny_module(pair, COARSE, teacher=here)
    module.configure_model()
    for objective in (COARSE, Objective(ForwardKL(), TopK(4, "teacher")), Objective(ReverseKL(), SampledToken())):
        found = []
        for teacher in (here, there):
            module.teacher = teacher
            module.zero_grad()
            out = module.score(rollout, objective)
            out.loss.backward()
            found.append((out.loss.detach(), [p.grad.clone() for p in module.student.parameters()]))
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_run_equals_the_local_one_and_a_sweep_pays_once(pair: Pair, server: Breakable, tmp_path: Path) -> None:
    local, logged = fit(pair, tmp_path / "local", FrozenTeacher(str(pair[1])))
    first = ServerTeacher(server.url, k=8, cache=str(tmp_path / "kept"))
    remote, seen = fit(pair, tmp_path / "remote", first)
    ours, theirs = weights(remote), weights(local)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5
    for key in ("train/loss", "train/k1", "train/overlap", "eval/completion_tokens"):
        assert seen[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-6)
    assert "eval/reverse_kl" not in seen and 0.0 < seen["eval/coarse_reverse_kl"] <= logged["eval/reverse_kl"] + 1e-6
    assert first.asked >= 32 and server.requests == first.asked + 1  # 4 steps of 8 rows, the evaluations, and the probe
    again = ServerTeacher(server.url, k=8, cache=str(tmp_path / "kept"))
    repeated, _ = fit(pair, tmp_path / "again", again)
    assert same(weights(repeated), ours) and again.asked == 0 and again.kept >= 32


def test_several_servers_share_the_rows(pair: Pair, server: Breakable, tmp_path: Path) -> None:
    def routed(*members: Teacher) -> RoutedTeacher:
        return RoutedTeacher(dict(zip("ab", members, strict=True)), column="side", default="a")

    prompts = [Prompt(i, "", (1, 5), fields={"side": "ab"[i % 2]}, row=i) for i in range(4)]
    texts = [Completion((6, 7 + i, 2), (-1.0,) * 3, True, 0) for i in range(4)]
    losses = []
    for teacher in (
        routed(FrozenTeacher(str(pair[1])), FrozenTeacher(str(pair[0]))),
        routed(ServerTeacher(server.url, k=6, cache=str(tmp_path)), FrozenTeacher(str(pair[0]))),
    ):
        module = tiny_module(pair, COARSE, teacher=teacher)
        for leaf in teacher.leaves().values():
            leaf.meet(module.vocabulary)
        module.configure_model()
        losses.append(module.score(module.join(prompts, texts), COARSE).loss)
    assert torch.allclose(*losses, rtol=1e-5)
    with pytest.raises(ValueError, match="whole laws"):
        EnsembleTeacher([ServerTeacher(server.url), FrozenTeacher(str(pair[1]))])


# ---- reported before training ----------------------------------------------------------------------------------------------
def drop(answer: dict[str, Any]) -> None:
    del answer["choices"][0]["prompt_logprobs"]


def raw_logits(answer: dict[str, Any]) -> None:
    for place in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in place.values():
            entry["logprob"] += 30.0


def test_a_wrong_server_is_reported_before_training(pair: Pair, server: Breakable, scorer: Scorer, tmp_path: Path) -> None:
    def refused(kind: type[Exception], says: str, **given: Any) -> None:
        teacher = ServerTeacher(**{"url": server.url, "k": 6, "cache": str(tmp_path), "retries": 0, **given})
        module = tiny_module(pair, COARSE, teacher=teacher)
        with pytest.raises(kind, match=says):
            tiny_trainer(tmp_path).fit(module, datamodule=tiny_data())
        assert module.student is None  # no weight was loaded

    refused(ValueError, r"is not served at .* served there: tiny", model="another")
    refused(ValueError, "answers 0 to 8", k=9)
    with running(scorer) as gone:
        url = gone.url
    refused(ValueError, r"Connection refused.*Start it, or correct model.teacher.url", url=url)
    server.spoil = drop
    refused(ValueError, "no prompt_logprobs")
    server.spoil = raw_logits
    refused(ValueError, "--logprobs-mode raw_logprobs")
    server.spoil, server.delays = lambda answer: None, [1.0]
    refused(ValueError, "timed out", timeout=0.2)
    for url in ("127.0.0.1:8000", "ftp://x"):
        with pytest.raises(ValueError, match="must begin with http"):
            ServerTeacher(url)


def test_another_tokenizer_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", hidden=16, layers=1, heads=2, seed=3, characters="9876543210+=-* abcdxyz")
    with running(Scorer(str(other), "other", max_logprobs=8)) as server:
        module = tiny_module(pair, COARSE, teacher=ServerTeacher(server.url, k=6, cache=""))
        with pytest.raises(VocabularyMismatch, match=r"different tokenizers: .* ids differ"):
            tiny_trainer(tmp_path).fit(module, datamodule=tiny_data())


def test_a_slow_answer_is_asked_for_again(pair: Pair, server: Breakable, tmp_path: Path) -> None:
    teacher = ServerTeacher(server.url, k=6, cache="", timeout=0.4, retries=2)
    teacher.meet(Vocabulary.of(FrozenTeacher(str(pair[1])).tokenizer()))
    server.delays = [1.0]
    before = server.requests
    teacher.prepare(Rendering.of([[1, 5]], [[6, 2]], 0))
    assert teacher.asked == 1 and server.requests == before + 2
    with pytest.raises(Refused, match="answered 404: no such path"):
        Endpoint(server.url, 1.0, 0).get("/v2/models")


def test_answers_are_kept_apart_when_weights_change_and_damaged_ones_are_asked_again(
    pair: Pair, server: Breakable, tmp_path: Path
) -> None:
    vocabulary = Vocabulary.of(FrozenTeacher(str(pair[1])).tokenizer())
    text = Rendering.of([[1, 5], [1, 6]], [[6, 2], [7, 2]], 0)

    def asked(url: str) -> int:
        teacher = ServerTeacher(url, k=6, cache=str(tmp_path))
        teacher.meet(vocabulary)
        teacher.prepare(text)
        return teacher.asked

    assert asked(server.url) == 2 and asked(server.url) == 0
    next(tmp_path.glob("*/*/*.safetensors")).write_bytes(b"half a fi")
    assert asked(server.url) == 1
    moved = Scorer(str(pair[1]), "tiny", max_logprobs=8)
    for parameter in moved.model.parameters():
        parameter.mul_(1.3)
    with running(moved) as other:
        assert asked(other.url) == 2 and asked(server.url) == 0 and asked(other.url) == 0


# ---- away in the middle of a run ---------------------------------------------------------------------------------------
class Killer(pl.Callback):
    """Stops the server after an optimizer step, and starts another one at its address a moment later."""

    def __init__(self, server: Breakable, scorer: Scorer, at: int, back_after: float | None) -> None:
        self.server, self.scorer, self.at, self.back_after = server, scorer, at, back_after
        self.second: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.at:
            return
        port = self.server.server_address[1]
        self.server.shutdown()
        self.server.server_close()
        if self.back_after is not None:
            threading.Timer(self.back_after, self._again, (port,)).start()

    def _again(self, port: int) -> None:
        self.second = running(self.scorer, port)
        self.second.__enter__()


def interrupted(pair: Pair, root: Path, scorer: Scorer, back_after: float | None, **kwargs: Any) -> Any:
    with running(scorer) as server:
        teacher = ServerTeacher(server.url, k=6, cache="", retries=0, **kwargs)
        killer = Killer(server, scorer, 3, back_after)
        refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=8), every_n_steps=1, seed=5)
        module, _ = fit(pair, root, teacher, COARSE, killer, refresh, OPDCheckpoint(every_n_steps=0))
        killer.second.__exit__(None, None, None)
        return module


def test_a_server_that_dies_pauses_the_run_and_resumes_it(
    pair: Pair, scorer: Scorer, server: Breakable, tmp_path: Path
) -> None:
    whole, _ = fit(pair, tmp_path / "whole", ServerTeacher(server.url, k=6, cache=""))
    module = interrupted(pair, tmp_path / "paused", scorer, 1.5)
    assert same(weights(module), weights(whole))
    assert (tmp_path / "paused" / "checkpoints" / "step-000003.ckpt").is_file()


def test_a_server_that_stays_away_ends_the_run_so_that_it_resumes(
    pair: Pair, scorer: Scorer, server: Breakable, tmp_path: Path
) -> None:
    whole, _ = fit(pair, tmp_path / "whole", ServerTeacher(server.url, k=6, cache=""))
    with pytest.raises(TeacherAway, match="--ckpt_path last") as away:
        interrupted(pair, tmp_path / "left", scorer, None, patience=0.5)
    assert away.value.code == 75
    saved = tmp_path / "left" / "checkpoints" / "step-000003.ckpt"
    module, _ = fit(pair, tmp_path / "left", ServerTeacher(server.url, k=6, cache=""), ckpt_path=saved)
    assert same(weights(module), weights(whole))


def test_everybody_else_hears_of_a_failure_after_what_is_under_way(server: Breakable, pair: Pair) -> None:
    teacher = ServerTeacher(server.url, k=6, cache="", retries=0, timeout=0.5, at_once=2)
    teacher.meet(Vocabulary.of(FrozenTeacher(str(pair[1])).tokenizer()))
    server.delays = [0.0, 2.0, 2.0]
    before = server.requests
    with pytest.raises(Unreachable, match="timed out"):
        teacher.prepare(Rendering.of([[1, 5]] * 8, [[4 + i, 2] for i in range(8)], 0))
    assert server.requests - before < 8
    asked = teacher.asked
    teacher.prepare(Rendering.of([[1, 5]] * 8, [[4 + i, 2] for i in range(8)], 0))
    assert teacher.asked == 8 > asked  # what was answered before the failure is not paid again
