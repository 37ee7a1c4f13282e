"""What a strategy cannot do is refused with what to take instead, before any process is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from opd_lightning.strategies import FSDP1Strategy, refuse_split_weights
from tests.helpers import tiny_trainer


def test_lightnings_own_fsdp1_is_refused_and_the_flag_is_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--trainer\.strategy fsdp2`, or `fsdp`"):
        refuse_split_weights(FSDPStrategy())
    own = tiny_trainer(tmp_path, strategy="fsdp").strategy
    assert isinstance(own, FSDP1Strategy)
    refuse_split_weights(own)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_fsdp1_computes_in_the_precision_of_its_weights(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model\.student\.dtype bfloat16.*fsdp2"):
        tiny_trainer(tmp_path, strategy="fsdp", precision=precision)


def test_fsdp1_wants_one_dtype() -> None:
    strategy = FSDP1Strategy()
    strategy.base = torch.nn.Linear(2, 2)
    mixed = torch.nn.Sequential(strategy.base, torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bfloat16 and float32 \(adapters are float32\).*fsdp2"):
        strategy._setup_model(mixed)
