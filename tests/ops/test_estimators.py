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


def expected_policy_gradient(estimator) -> torch.Tensor:
    """Of descending with minus the estimate as a held-fixed advantage."""
    logits, teacher = setup()
    student = logits.log_softmax(-1)
    weight = (student.exp() * estimator(student, teacher)).detach()
    return torch.autograd.grad((weight * student).sum(), logits)[0]


def test_as_advantages_only_k1_descends_the_reverse_kl() -> None:
    """k2 follows no KL, and k3 pushes the forward KL up while it pushes the reverse one down."""
    reverse, forward = kl_gradient(forward=False), kl_gradient(forward=True)
    torch.testing.assert_close(expected_policy_gradient(k1), reverse)
    torch.testing.assert_close(expected_policy_gradient(k3), reverse - forward)
    found = expected_policy_gradient(k2)
    for kl in (reverse, forward):
        assert abs(torch.cosine_similarity(found, kl, dim=0)) < 0.99


def test_the_absolute_log_ratio_backpropagated_descends_twice_the_total_variation() -> None:
    logits, teacher = setup()
    (exact,) = torch.autograd.grad((logits.softmax(-1) - teacher.exp()).abs().sum(), logits)
    torch.testing.assert_close(expected_gradient(lambda student, teacher: (student - teacher).abs()), exact)
