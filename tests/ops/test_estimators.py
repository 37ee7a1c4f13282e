"""Values and gradients of k1, k2, k3 by exact summation: why none of them is a divergence here."""

import torch

from opd_lightning.ops.estimators import k1, k2, k3


def setup() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64).log_softmax(-1)


def expected_gradient(estimator) -> torch.Tensor:
    logits, teacher = setup()
    student = logits.log_softmax(-1)
    return torch.autograd.grad((student.exp().detach() * estimator(student, teacher)).sum(), logits)[0]


def kl_gradient(forward: bool) -> torch.Tensor:
    logits, teacher = setup()
    student = logits.log_softmax(-1)
    a, b = (teacher, student) if forward else (student, teacher)
    return torch.autograd.grad((a.exp() * (a - b)).sum(), logits)[0]


def test_values() -> None:
    logits, teacher = setup()
    student = logits.detach().log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum()
    torch.testing.assert_close((student.exp() * k1(student, teacher)).sum(), kl)
    torch.testing.assert_close((student.exp() * k3(student, teacher)).sum(), kl)
    assert (k3(student, teacher) >= 0).all()


def test_gradients_are_something_else() -> None:
    assert expected_gradient(k1).abs().max() < 1e-15
    torch.testing.assert_close(expected_gradient(k2), kl_gradient(forward=False))
    torch.testing.assert_close(expected_gradient(k3), kl_gradient(forward=True))
