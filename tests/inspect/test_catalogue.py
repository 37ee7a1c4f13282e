"""The table of methods measures what it says."""

from __future__ import annotations

import pytest

from opd_lightning.cli import read
from opd_lightning.inspect import catalogue


@pytest.mark.slow
def test_measured_bias_is_exact() -> None:
    methods = {method.name: method for method in catalogue.shipped(read)}
    pair = catalogue.Bench()
    for name in ("opd", "thinking_machines", "vopd", "cr_opd_balanced"):
        found = catalogue.measure(methods[name], pair)
        assert found.token < 1e-12 and found.token_cosine > 1 - 1e-12, name
        assert found.sequence > 0.1
    assert catalogue.measure(methods["opd"], pair).training > 1 - 1e-5
    assert catalogue.measure(methods["thinking_machines"], pair).noise > catalogue.measure(methods["opd"], pair).noise
    assert catalogue.measure(methods["many_faces_raw_topk"], pair).token > 0.1
