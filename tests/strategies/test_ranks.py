"""What lives beside a run, on two processes: a teacher server, rollouts written ahead, a cold start that ends by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd_lightning.callbacks.ahead import Ahead
from opd_lightning.models.serving import Scorer, ScoringServer
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_trainer
from tests.strategies.ranks_run import run
from tests.strategies.test_splits import two_processes
from tests.strategies.test_swap import assert_same

STEP_2 = "checkpoints/step-000002.ckpt"


@pytest.fixture(scope="module")
def address(pair: tuple[Path, Path]) -> Iterator[str]:
    """Of a server that holds the tiny teacher."""
    server = ScoringServer(Scorer(str(pair[1]), "tiny", max_logprobs=8), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategies"), [("server", ("ddp", "fsdp2")), ("until", ("ddp", "fsdp", "fsdp2")), ("ahead", ("ddp",))]
)
def test_two_processes_do_what_one_does(
    kind: str, strategies: tuple[str, ...], address: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cases = [f"{strategy}:{kind}" for strategy in strategies]
    where = address
    if kind == "until":
        first, *later = (row["reverse_kl"] for row in run(tmp_path / "curve", pair, "auto", 1, kind, "0")["history"])
        assert len(later) == 2 and min(later) < first  # it lasts all three steps, and the student comes nearer
        where = str((first + min(later)) / 2)
    two_processes("tests/strategies/ranks_run.py", tmp_path, *pair, where, *cases)
    alone = run(tmp_path / "alone" / "run", pair, "auto", 1, kind, where)
    asked = torch.tensor([0, 0])
    for case in cases:
        found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert found["rollouts"] == alone["rollouts"] and len(found["rollouts"]) == 32
        assert found["losses"] == pytest.approx(alone["losses"], abs=2e-6)
        assert_same({**found, "history": []}, {**alone, "history": []})
        for ours, theirs in zip(found["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        asked += torch.tensor(found["asked"]).sum(0)
        back = run(tmp_path / "back" / case, pair, "auto", 1, kind, where, str(tmp_path / case / STEP_2))
        assert_same({**back, "history": []}, {**alone, "history": []})
    if kind == "server":  # each row was asked for once, by one rank; the other strategy found all of them on disk
        assert asked.tolist() == [32, 32] and alone["asked"] == [(32, 0)]
    if kind == "until":
        assert [row["step"] for row in alone["history"]] in ([0.0, 1.0], [0.0, 1.0, 2.0])
        assert alone["history"][-1]["reverse_kl"] < float(where)  # it ended by itself


def test_writing_ahead_is_refused_under_sharding(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, strategy="fsdp2")
    with pytest.raises(ValueError, match=r"rollout\.ahead keeps a whole copy.*ddp"):
        Ahead.of("same", trainer, NativeSampler(max_new_tokens=4))
