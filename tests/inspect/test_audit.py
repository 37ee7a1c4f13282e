"""Losses with known mistakes are named, sound ones pass, unusable ones are refused with what to change."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.inspect.audit import Audit, UnusableLoss, audit
from opd_lightning.inspect.audit_text import load_loss
from opd_lightning.inspect.fields import Fields, fit
from opd_lightning.inspect.oracle import TabularWorld

LOSSES = Path(__file__).parent / "losses"


def loss(file: str, name: str) -> Callable[..., torch.Tensor]:
    return load_loss(f"{LOSSES / file}.py:{name}")


def audited(file: str, name: str) -> Audit:
    return audit(loss(file, name))


# ---- mistakes ---------------------------------------------------------------------------------------------------------------
TRAPS = {
    # name: (defect, gradient of, words in what it follows)
    "k1": ("k1_backpropagated", "nothing", "nothing"),
    "k3": ("k3_backpropagated", "forward_kl", "forward KL"),
    "raw_top_k": ("raw_top_k", "other", "reverse KL, top-2 by student, closure raw"),
    "raw_top_k_of_the_teacher": ("raw_top_k", "other", "forward KL, top-2 by teacher, closure raw"),
    "top_k_value_as_advantage": ("value_as_advantage", "nothing", "nothing"),
    "kl_as_advantage": ("value_as_advantage", "nothing", "nothing"),
    "renormalised_top_1": ("renormalized_top_1", "nothing", "nothing"),
    "gamma_t": ("gamma_t", "other", "cost i weighted by gamma^i (gamma=0.8)"),
    "gamma_t_on_the_return": ("gamma_t", "other", "all credit of token t weighted by gamma^t (gamma=0.8)"),
    "gamma_t_on_the_token": ("gamma_t", "other", "the cost of token t weighted by gamma^t (gamma=0.8)"),
    "padding_in_the_mean": ("padding_in_mean", "reverse_kl", "reverse KL"),
    "no_mask": ("padding_in_mean", "reverse_kl", "reverse KL"),
    "no_mask_summed": ("padding_leak", "reverse_kl", "reverse KL"),
    "undetached_advantage": ("undetached_advantage", "other", "reverse KL - 1 x entropy"),
    "detached_weight": ("detached_weight", "other", "entropy alone"),
    "detached_weight_over_the_vocabulary": ("detached_weight", "nothing", "nothing"),
    "detached_weight_on_a_top_k": ("detached_weight", "other", "the student's mass on the top-2 by teacher"),
    "detached_probability_of_the_token": ("detached_weight", "other", "none of these"),
    "detached_weight_with_the_other_sign": ("detached_weight", "other", "entropy alone"),
    "hard_labels": ("moves_at_agreement", "other", "minus the student's log-mass on the top-1 by teacher"),
    "k3_as_advantage": ("k3_as_advantage", "other", "reverse KL - 1 x forward KL"),
    "local_term_missing": ("local_term_missing", "other", "later states"),
    "own_text": ("own_text_likelihood", "nothing", "nothing"),
    "wrong_sign": ("wrong_sign", "other", "reverse KL"),
    "entropy_bonus": ("entropy_term", "other", "reverse KL - 0.1 x entropy"),
    "everything_detached": ("no_gradient", "nothing", "nothing"),
    "not_minus_infinity": ("infinite_logits", "reverse_kl", "reverse KL"),
    "tempered_student": ("moves_at_agreement", "other", "none of these"),
}
TEACHER_ABSENT = {
    "k1",
    "renormalised_top_1",
    "detached_weight",
    "detached_weight_over_the_vocabulary",
    "detached_probability_of_the_token",
    "detached_weight_with_the_other_sign",
    "own_text",
    "everything_detached",
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_mistake_is_named_and_nothing_else_is(name: str) -> None:
    found = audited("traps", name)
    expected, kind, words = TRAPS[name]
    assert [d.name for d in found.defects] == [expected]
    assert found.gradient_of == kind
    assert words in found.follows
    assert found.sound == (expected == "infinite_logits")  # fragile, not wrong
    assert found.teacher_in_gradient == (name not in TEACHER_ABSENT)
    assert found.padding_leak == (expected in ("padding_in_mean", "padding_leak"))
    assert found.inf_safe == (expected != "infinite_logits")
    assert found.residual is None or found.residual < 1e-12


def test_a_value_as_an_advantage_carries_the_teacher_only_as_noise() -> None:
    found = audited("traps", "kl_as_advantage")
    assert found.teacher_in_gradient
    assert not found.teacher_in_expectation
    assert found.variance["loss"].relative is None
    assert found.variance["loss"].trace > 0


def test_padding_is_told_apart() -> None:
    assert tuple(audited("traps", "padding_in_the_mean").padding) == (False, True, True)
    assert tuple(audited("traps", "no_mask").padding) == (True, True, True)
    assert tuple(audited("traps", "no_mask_summed").padding) == (True, True, False)


# ---- sound losses -----------------------------------------------------------------------------------------------------------
TOKENS = "mean over all tokens of the batch"
CHAINED = "no plain sum or mean: a token's weight depends on the other tokens"
SOUND = {
    # name: (gradient of, what it follows, how it adds up)
    "reverse_kl": ("reverse_kl", "token-level reverse KL", TOKENS),
    "reverse_kl_summed": ("reverse_kl", "token-level reverse KL", "sum over all tokens"),
    "reverse_kl_of_sequences": (
        "reverse_kl",
        "token-level reverse KL",
        "mean over a completion's tokens, mean over completions",
    ),
    "reverse_kl_in_single_precision": ("reverse_kl", "token-level reverse KL", TOKENS),
    "reverse_kl_by_detaching": ("reverse_kl", "token-level reverse KL", TOKENS),
    "forward_kl": ("forward_kl", "token-level forward KL", TOKENS),
    "policy_gradient": ("reverse_kl", "token-level reverse KL", TOKENS),
    "policy_gradient_with_ratio_and_baseline": ("reverse_kl", "token-level reverse KL", TOKENS),
    "k2": ("reverse_kl", "token-level reverse KL", TOKENS),
    "half_absolute_log_ratio": ("total_variation", "total variation", TOKENS),
    "return_to_go": ("other", "sequence-level reverse KL", CHAINED),
    "discounted": ("other", "discounted reverse KL (gamma=0.7)", CHAINED),
    "top_2_and_tail": ("other", "reverse KL, top-2 by student, closure tail", TOKENS),
    "jsd": ("other", "token-level JSD (beta=0.5)", TOKENS),
    "writes_into_its_inputs": ("reverse_kl", "token-level reverse KL", TOKENS),
    "takes_gradients_itself": ("reverse_kl", "token-level reverse KL", TOKENS),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_loss_passes(name: str) -> None:
    found = audited("sound", name)
    assert (found.gradient_of, found.follows, found.reduction) == SOUND[name]
    assert found.sound
    assert found.named_defect is None
    assert found.teacher_in_gradient and found.teacher_in_expectation
    assert not found.padding_leak
    assert found.inf_safe
    if found.gradient_of != "other":
        assert found.cosines[found.gradient_of] == pytest.approx(1.0, abs=1e-6)


def test_noise_is_that_of_the_estimator_that_it_is() -> None:
    """k2 and the policy gradient are one estimator, and the full vocabulary is the library's; whatever the scale."""
    sampled, summed = audited("sound", "k2").variance, audited("sound", "reverse_kl_summed").variance
    assert sampled["loss"].relative == pytest.approx(sampled["sampled_token"].relative)
    assert summed["loss"].relative == pytest.approx(summed["full_vocabulary"].relative)
    baseline = audited("sound", "policy_gradient_with_ratio_and_baseline").variance
    assert baseline["loss"].relative == pytest.approx(baseline["sampled_token_with_baseline"].relative)
    assert summed["full_vocabulary"].relative < sampled["sampled_token"].relative


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("vocab", [4, 6])
def test_the_verdict_does_not_hang_on_the_world(vocab: int, seed: int) -> None:
    assert audit(loss("traps", "raw_top_k"), vocab, seed).named_defect == "raw_top_k"
    assert audit(loss("traps", "gamma_t"), vocab, seed).named_defect == "gamma_t"
    assert audit(loss("sound", "discounted"), vocab, seed).sound


def test_lags_add_up_for_every_gamma() -> None:
    from opd_lightning.inspect.oracle import reverse_kl

    fields = Fields(TabularWorld.random(vocab=4, horizon=3, seed=3))
    expected = fields.world.gradient(reverse_kl, 0.3)
    torch.testing.assert_close(sum(0.3**k * lag for k, lag in enumerate(fields.lags)), expected, atol=1e-13, rtol=0.0)
    assert fit(expected, *fields.lags).share(2) == pytest.approx(0.09)


# ---- what minus infinity does -----------------------------------------------------------------------------------------------
def naive_forward_kl(student: Any, teacher: Any, tokens: Any, mask: Any) -> torch.Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return torch.where(mask, (q.exp() * (q - p)).sum(-1), 0.0).sum()


def uniform_smoothing(student: Any, teacher: Any, tokens: Any, mask: Any) -> torch.Tensor:
    """Finite everywhere, but a token that does not exist keeps a share of the mixture."""
    p = 0.9 * student.softmax(-1) + 0.1 / student.shape[-1]
    q = 0.9 * teacher.softmax(-1) + 0.1 / student.shape[-1]
    return torch.where(mask, (q * (q.log() - p.log())).sum(-1), 0.0).sum()


def test_minus_infinity_is_reported_for_student_teacher_and_both() -> None:
    assert audit(naive_forward_kl).infinity == {"student": "ok", "teacher": "the loss is NaN", "both": "the loss is NaN"}
    smooth = audit(uniform_smoothing)
    assert smooth.infinity == {"student": "ok", "teacher": "ok", "both": "not the loss without that token"}
    assert smooth.gradient_of == "other"
    broken = audited("traps", "not_minus_infinity")
    assert broken.infinity["both"] == "the loss is NaN"
    assert broken.infinity["teacher"] == "the gradient is NaN"


# ---- kinds of inputs --------------------------------------------------------------------------------------------------------
def wants_numbers(student: Any, teacher: Any, tokens: Any, mask: Any) -> torch.Tensor:
    p, q = (x.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) for x in (student, teacher))
    return 0.5 * ((p - q) ** 2 * (1 - (1 - mask))).sum() / mask.sum()


def wants_single_precision(student: Any, teacher: Any, tokens: Any, mask: Any) -> torch.Tensor:
    p, q = (x.log_softmax(-1) for x in (student, teacher))
    out = torch.zeros_like(tokens, dtype=torch.float32)[..., None].expand_as(p).clone()
    out.scatter_(-1, tokens[..., None], (p - q).detach().gather(-1, tokens[..., None]))  # refuses float64
    return ((out * p).nan_to_num() * mask[..., None]).sum()


@pytest.mark.parametrize("given", [wants_numbers, wants_single_precision])
def test_masks_and_floats_of_the_kind_that_a_loss_wants(given: Callable[..., torch.Tensor]) -> None:
    found = audit(given)
    assert found.gradient_of == "reverse_kl"
    assert not found.padding_leak


# ---- the command line -------------------------------------------------------------------------------------------------------
def run(*words: str) -> int:
    try:
        return main(["audit-loss", *words])
    except SystemExit as done:
        return int(done.code or 0)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{LOSSES}/traps.py:k1") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "verdict: DEFECT: k1 back-propagated" in shown
    assert "the teacher is not in it" in shown
    assert run(f"{LOSSES}/sound.py:policy_gradient") == 0
    shown = capsys.readouterr().out
    assert "verdict: no defect found; it descends token-level reverse KL" in shown
    for estimator in ("this loss", "sampled token", "closed-form baseline", "full vocabulary"):
        assert estimator in shown
    assert max(map(len, shown.splitlines()[1:])) <= 110


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{LOSSES}/traps.py:k3", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["gradient_of"] == "forward_kl"
    assert (found["teacher_in_gradient"], found["padding_leak"], found["inf_safe"]) == (True, False, True)
    assert found["named_defect"] == "k3_backpropagated"
    assert set(found["cosines"]) == {"reverse_kl", "forward_kl", "total_variation", "sequence_reverse_kl"}
    assert set(found["variance"]) == {"loss", "sampled_token", "sampled_token_with_baseline", "full_vocabulary"}
    assert run(f"{LOSSES}/sound.py:k2", "--json", "--vocab", "4") == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True


def test_help_explains_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for text in ("opd audit-loss my_loss.py:distill", "def distill(student_logits", "exit code: 0", "--json", "--vocab"):
        assert text in shown


BAD = """
import torch
def three(student, teacher, tokens): return student.sum()
def per_token(student, teacher, tokens, mask): return student.log_softmax(-1).sum(-1)
def pair(student, teacher, tokens, mask): return student.sum(), {}
def number(student, teacher, tokens, mask): return 0.0
def raises(student, teacher, tokens, mask): raise KeyError("nothing")
def big_top_k(student, teacher, tokens, mask): return student.topk(50, -1).values.sum()
def not_finite(student, teacher, tokens, mask): return student.sum() / 0.0
def backward(student, teacher, tokens, mask):
    loss = student.square().sum()
    loss.backward()
    return loss
constant = 3
"""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none.py:three", "there is no file 'none.py'"),
        ("bad.py", "which function?"),
        ("bad.py:thre", "Did you mean bad.py:three?"),
        ("bad.py:constant", "has no function 'constant'"),
        ("bad.py:three", "cannot be called with four arguments"),
        ("bad.py:per_token", "returned a tensor torch.float64 of shape [1, 3]"),
        ("bad.py:pair", "returned <class 'tuple'>"),
        ("bad.py:number", "returned <class 'float'>"),
        ("bad.py:raises", "raised KeyError: 'nothing'"),
        ("bad.py:big_top_k", "needs a smaller k or a larger --vocab"),
        ("bad.py:not_finite", "is not finite on ordinary logits"),
        ("bad.py:backward", "without calling backward()"),
        ("broken.py:fn", "cannot be imported: NameError"),
        ("text.yaml:fn", "is no Python file"),
    ],
)
def test_bad_usage_says_what_to_change(
    spec: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(BAD)
    Path("broken.py").write_text("import torch\nundefined_name\n")
    Path("text.yaml").write_text("x: 1")
    assert run(spec) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown


def test_a_loss_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_loss.py").write_text("SCALE = 2.0\n")
    (tmp_path / "mine.py").write_text(
        "from beside_the_loss import SCALE\n"
        "def fn(student, teacher, tokens, mask, scale=SCALE):\n"
        "    kl = student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))\n"
        "    return scale * (kl.sum(-1) * mask).sum()\n"
    )
    before = list(sys.path)
    assert audit(load_loss(f"{tmp_path}/mine.py:fn")).gradient_of == "reverse_kl"
    assert sys.path == before


def test_the_world_must_be_enumerable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="between 4 and 16"):
        audit(loss("sound", "k2"), vocab=50)
    assert run(f"{LOSSES}/sound.py:k2", "--vocab", "2") == 2
    with pytest.raises(UnusableLoss):
        audit(lambda s, t, y, m: (s.sum(), None))  # type: ignore[arg-type, return-value]


def test_a_world_leaves_the_tables_that_it_is_given_alone() -> None:
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    world = TabularWorld(student, teacher, horizon=2)
    assert world.student.requires_grad
    assert not student.requires_grad and not teacher.requires_grad
