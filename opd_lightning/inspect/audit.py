"""What a token loss of your own really does, measured on every completion of a small world.

A `TabularWorld` of a few tokens and three steps is enumerated in float64, so the expected gradient of a loss over the
student's own completions is a sum, not an estimate, and can be compared with exact gradients::

    def mine(student_logits, teacher_logits, tokens, mask):
        ...
        return scalar

    found = audit(mine)
    print(found.gradient_of, found.named_defect)

The measured world has a fixed length (no completion ends early), so sums and means over tokens differ by a factor only;
lengths and padding are probed on batches of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.inspect.defects import Defect, defect
from opd_lightning.inspect.fields import LOCAL, TITLES, Fields, Match
from opd_lightning.inspect.oracle import Moments, TabularWorld
from opd_lightning.inspect.probes import (
    Measured,
    Padding,
    TokenLoss,
    UnusableLoss,
    adapted,
    probe_infinity,
    probe_padding,
    probe_reduction,
)
from opd_lightning.objectives import ClosedFormBaseline, Objective, ReverseKL, SampledToken

__all__ = ["Audit", "Noise", "UnusableLoss", "audit"]

HORIZON = 3
VOCAB = (4, 16)
"""Sizes of vocabulary that can be enumerated in reasonable time and still tell the fields apart."""


@dataclass(frozen=True)
class Noise:
    """Sampling noise of a gradient.

    Attributes:
        trace: of its covariance over the student's completions.
        relative: that, over the squared norm of the expected gradient; None where that is zero. It does not depend on how
            the loss is scaled.
    """

    trace: float
    relative: float | None


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        gradient_of: ``reverse_kl``, ``forward_kl``, ``total_variation``, ``nothing`` or ``other``.
        follows: the recognised gradient in words.
        scale: its factor; None if nothing was recognised.
        residual: what it leaves unexplained, relative; None if nothing was recognised.
        cosines: of the expected gradient with the known ones.
        teacher_in_gradient: another teacher changes the gradient of some sample.
        teacher_in_expectation: another teacher changes the expected gradient.
        padding: what masked positions do.
        infinity: what minus infinity does, in the student's logits, the teacher's and both.
        reduction: how tokens and completions are added up.
        variance: noise of this loss and of the library's own estimators of the reverse KL.
        defects: what is wrong, the most telling first.
        completions: how many were enumerated.
        tolerance: relative error up to which two gradients were called the same; larger where the loss rounds.
    """

    gradient_of: str
    follows: str
    scale: float | None
    residual: float | None
    cosines: dict[str, float]
    teacher_in_gradient: bool
    teacher_in_expectation: bool
    padding: Padding
    infinity: dict[str, str]
    reduction: str
    variance: dict[str, Noise]
    defects: tuple[Defect, ...]
    completions: int
    tolerance: float

    @property
    def sound(self) -> bool:
        """No mistake in what it descends. A loss that only -inf logits break is fragile, not wrong."""
        return all(defect.name == "infinite_logits" for defect in self.defects)

    @property
    def padding_leak(self) -> bool:
        return self.padding.leaks

    @property
    def inf_safe(self) -> bool:
        return all(found == "ok" for found in self.infinity.values())

    @property
    def named_defect(self) -> str | None:
        """The name of the most telling defect."""
        return self.defects[0].name if self.defects else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "gradient_of": self.gradient_of,
            "teacher_in_gradient": self.teacher_in_gradient,
            "padding_leak": self.padding_leak,
            "inf_safe": self.inf_safe,
            "cosines": self.cosines,
            "variance": {name: asdict(noise) for name, noise in self.variance.items()},
            "named_defect": self.named_defect,
            "sound": self.sound,
            "defects": [asdict(d) for d in self.defects],
            "follows": self.follows,
            "scale": self.scale,
            "residual": self.residual,
            "teacher_in_expectation": self.teacher_in_expectation,
            "padding": self.padding._asdict(),
            "infinity": self.infinity,
            "reduction": self.reduction,
            "completions": self.completions,
            "tolerance": self.tolerance,
        }


def audit(loss: TokenLoss, vocab: int = 5, seed: int = 0) -> Audit:
    """Measure a loss.

    Args:
        loss: ``loss(student_logits (B, T, V), teacher_logits (B, T, V), tokens (B, T), mask (B, T)) -> scalar`` to minimise.
            Position t scores ``tokens[:, t]``; the mask is True at completion tokens. Logits are float64 and the mask is
            boolean, unless the loss accepts only float32 logits or a mask of numbers.
        vocab: tokens of the world. A top-k loss shows its support only if k is smaller.
        seed: of the world's logits.

    Raises:
        UnusableLoss: if the loss raises, or returns no finite scalar.
        ValueError: for a vocabulary that is too small or too large.
    """
    if not VOCAB[0] <= vocab <= VOCAB[1]:
        raise ValueError(
            f"vocab={vocab}: between {VOCAB[0]} and {VOCAB[1]} tokens can be enumerated; give --vocab in that range"
        )
    loss = adapted(loss, vocab)
    world = TabularWorld.random(vocab, HORIZON, seed)
    student, stranger = world.student.detach(), TabularWorld.random(vocab, HORIZON, seed + 1).teacher
    here = Measured(loss, world)
    other = Measured(loss, TabularWorld(student, stranger, HORIZON))
    agreed = Measured(loss, TabularWorld(student, student.clone(), HORIZON))
    fields = Fields(world)
    gradient_of, match = _recognised(here, fields)
    padding = probe_padding(loss, vocab, here.tolerance)
    infinity = probe_infinity(loss, vocab)
    in_gradient = _differ(here.rows, other.rows, here)
    found = _Findings(here, other, agreed, match, gradient_of, in_gradient)
    return Audit(
        gradient_of=gradient_of,
        follows=match.title if match else TITLES[gradient_of],
        scale=match.scale if match else None,
        residual=match.residual if match else None,
        cosines=fields.cosines(here.mean if gradient_of != "nothing" else torch.zeros_like(here.mean)),
        teacher_in_gradient=in_gradient,
        teacher_in_expectation=_differ(here.mean, other.mean, here),
        padding=padding,
        infinity=infinity,
        reduction="none" if here.dead else probe_reduction(loss, vocab, here.tolerance),
        variance=_variance(here, gradient_of),
        defects=tuple(_ordered([*found, *_robustness(padding, infinity)])),
        completions=len(world.paths),
        tolerance=here.tolerance,
    )


def _recognised(here: Measured, fields: Fields) -> tuple[str, Match | None]:
    """(kind, match) of an expected gradient."""
    mean = here.mean
    if here.dead or float(mean.norm()) <= here.tolerance * here.size:
        return "nothing", None
    match = fields.recognise(mean, here.tolerance)
    if match and match.scale > 0 and match.defect is None:
        return next((name for name in LOCAL if TITLES[name] == match.title), "other"), match
    return "other", match


def _differ(a: Tensor, b: Tensor, here: Measured) -> bool:
    return not here.dead and float((a - b).abs().max()) > here.tolerance * float(here.rows.abs().max())


class _Findings:
    """The defects that show in the gradients."""

    def __init__(
        self, here: Measured, other: Measured, agreed: Measured, match: Match | None, gradient_of: str, teacher: bool
    ) -> None:
        self.here, self.other, self.agreed = here, other, agreed
        self.match, self.gradient_of, self.teacher = match, gradient_of, teacher

    def __iter__(self) -> Iterator[Defect]:
        if self.here.dead:
            yield self._dead()
            return
        if self.gradient_of == "nothing":
            yield self._zero()
            return
        if self.match and self.match.defect:
            yield defect(self.match.defect, f"The gradient is that of {self.match.title}.")
        elif self.match and self.match.scale < 0:
            yield defect("wrong_sign", f"It ascends: {self.match.title}.")
        elif self.gradient_of == "forward_kl" and self._is_k3():
            yield defect("k3_backpropagated")
        if not self.teacher:
            yield defect("detached_weight" if self._teacher_in_value() else "teacher_absent")
        yield from self._at_agreement()

    def _dead(self) -> Defect:
        """No sample has a gradient."""
        near = 1e-4 * self.here.tolerance
        if not self.here.attached:
            return defect("no_gradient")
        if float(self.here.values.abs().max()) <= near:
            return defect("renormalized_top_1")
        if self._teacher_in_value():
            return defect("detached_weight", "Here every sample's gradient is sum_v p_v grad log p_v = 0.")
        return defect("no_gradient")

    def _teacher_in_value(self) -> bool:
        size = max(1.0, float(self.here.values.abs().max()))
        return float((self.here.values - self.other.values).abs().max()) > 1e-4 * self.here.tolerance * size

    def _zero(self) -> Defect:
        """Samples have gradients that cancel."""
        weights = self.here.score_weights()
        if weights is None:
            return defect("zero_gradient")
        near = self.here.tolerance * float(weights.abs().max())
        if float((weights - weights[0, 0]).abs().max()) <= near and not self.teacher:
            return defect("k1_backpropagated" if float(weights[0, 0]) > 0 else "own_text_likelihood")
        states = self.here.states
        of_state = torch.zeros(int(states.max()) + 1, dtype=weights.dtype).index_put((states.flatten(),), weights.flatten())
        if float((weights - of_state[states]).abs().max()) <= near:
            return defect("value_as_advantage")
        return defect("zero_gradient")

    def _is_k3(self) -> bool:
        """Whether samples are weighted by 1 - q/p; an honest importance-weighted forward KL has -q/p."""
        weights = self.here.score_weights()
        if weights is None or self.match is None:
            return False
        student, teacher = (law.detach() for law in self.here.world.laws())
        ratio = (teacher - student).exp()[self.here.states, self.here.tokens]
        expected = self.match.scale * (1.0 - ratio)
        return float((weights - expected).abs().max()) <= 10 * self.here.tolerance * float(expected.abs().max())

    def _at_agreement(self) -> Iterator[Defect]:
        mean = self.agreed.mean
        if float(mean.norm()) <= 10 * self.here.tolerance * self.here.size:
            return
        mass = Fields(self.agreed.world).mass(mean, self.here.tolerance)
        if mass is None:
            yield defect("moves_at_agreement")
        else:
            what = "drains" if mass.scale > 0 else "pulls mass onto"
            yield defect("raw_top_k", f"At agreement it {what} the student's own {mass.title}.")


def _robustness(padding: Padding, infinity: dict[str, str]) -> Iterator[Defect]:
    if padding.counted:
        yield defect("padding_in_mean")
    elif padding.leaks:
        yield defect("padding_leak")
    broken = [f"{who}: {what}" for who, what in infinity.items() if what != "ok"]
    if broken:
        yield defect("infinite_logits", f"({'; '.join(broken)})")


def _ordered(found: list[Defect]) -> Iterator[Defect]:
    """Each defect once, and what only follows from another one left out."""
    consequences = {"teacher_absent", "moves_at_agreement", "raw_top_k"}
    for i, one in enumerate(found):
        explained = one.name in consequences and any(d.name not in ("wrong_sign", "infinite_logits") for d in found[:i])
        if not explained and one.name not in [d.name for d in found[:i]]:
            yield one


def _variance(here: Measured, gradient_of: str) -> dict[str, Noise]:
    own = None if gradient_of == "nothing" else here.trace / float(here.mean.square().sum())

    def noise(objective: Objective) -> Noise:
        found: Moments = here.world.moments_of(objective)
        return Noise(found.trace, found.trace / float(found.mean.square().sum()))

    return {
        "loss": Noise(here.trace, own),
        "sampled_token": noise(Objective(ReverseKL(), SampledToken())),
        "sampled_token_with_baseline": noise(Objective(ReverseKL(), SampledToken(), baseline=ClosedFormBaseline())),
        "full_vocabulary": noise(Objective(ReverseKL())),
    }
