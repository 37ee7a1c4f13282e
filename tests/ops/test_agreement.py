import math

import pytest
import torch

from opd_lightning.ops.agreement import agreement


def test_by_hand() -> None:
    student = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.6, 0.05, 0.2, 0.05]], dtype=torch.float64).log()
    found = agreement(student, teacher, k=2)  # student {0, 1}, teacher {1, 3}: shared {1}
    assert found.overlap.item() == 0.5
    assert math.isclose(found.student_mass.item(), 0.3, rel_tol=1e-12)
    assert math.isclose(found.teacher_mass.item(), 0.6, rel_tol=1e-12)
    assert found.advantage.item() == 0.0  # one shared token, renormalised: equal
    wide = agreement(student, teacher, k=3)  # {0, 1, 2} and {1, 3, 0}: shared {0, 1}
    p, q = (0.5 / 0.8, 0.3 / 0.8), (0.1 / 0.7, 0.6 / 0.7)
    expected = sum(a * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)) / 2
    assert math.isclose(wide.advantage.item(), expected, rel_tol=1e-12)


def test_empty_overlap_is_zero_not_nan() -> None:
    student = torch.tensor([[0.9, 0.05, 0.03, 0.02]]).log()
    teacher = torch.tensor([[0.02, 0.03, 0.05, 0.9]]).log()
    found = agreement(student, teacher, k=1)
    assert [float(x) for x in found[:4]] == [0.0, 0.0, 0.0, 0.0]
    assert float(found.student_top_mass) == float(found.teacher_top_mass) == pytest.approx(0.9)


def test_k_beyond_the_vocabulary_is_the_vocabulary() -> None:
    law = torch.randn(3, 4).log_softmax(-1)
    found = agreement(law, law, k=99)
    assert found.overlap.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(found.student_mass, torch.ones(3))
