"""Calls of somebody's token loss: on every completion of a world, on padded batches, on logits of minus infinity.

A loss is a black box here: ``loss(student_logits, teacher_logits, tokens, mask) -> scalar``. It gets copies that it may
write into, and every call differentiates it with respect to the student's logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_lightning.inspect.oracle import TabularWorld

TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student logits (B, T, V), teacher logits (B, T, V), tokens (B, T), mask (B, T)) -> scalar to minimise. Position t of the
logits scores ``tokens[:, t]``: nothing is left to shift."""

CONTRACT = "loss(student_logits [B,T,V], teacher_logits [B,T,V], tokens [B,T] int64, mask [B,T] bool) -> scalar tensor"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
COARSE = 2e-2
"""Relative error at which two gradients are the same, where a loss rounds to bfloat16 or float16."""


class UnusableLoss(ValueError):
    """A loss that cannot be audited: it raises, or does not return a scalar."""


class Batch(NamedTuple):
    """What a loss is called with."""

    student: Tensor
    teacher: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def shapes(self) -> str:
        return f"logits {list(self.student.shape)}, tokens and mask {list(self.tokens.shape)}"


class Call(NamedTuple):
    """What came back."""

    value: float
    gradient: Tensor
    dtype: torch.dtype
    attached: bool


def call(loss: TokenLoss, batch: Batch) -> Call:
    """Value and gradient on one batch.

    Raises:
        UnusableLoss: saying what was given, what is allowed and what to change.
    """
    leaf = batch.student.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        try:  # a clone of the leaf: a loss may write into its inputs
            result: Any = loss(leaf.clone(), batch.teacher.clone(), batch.tokens.clone(), batch.mask.clone())
        except Exception as error:
            raise UnusableLoss(
                f"the loss raised {type(error).__name__}: {error}\n"
                f"  Given: {batch.shapes}, mask of bool.\n  Allowed: {CONTRACT}\n"
                "  Change the loss so that it accepts these; a top-k larger than the vocabulary needs a smaller k or a larger "
                "--vocab"
            ) from error
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.is_floating_point():
            kind = (
                f"a tensor {result.dtype} of shape {list(result.shape)}" if isinstance(result, Tensor) else repr(type(result))
            )
            raise UnusableLoss(
                f"the loss returned {kind}\n  Allowed: {CONTRACT}\n"
                "  Return one floating-point scalar to minimise: reduce over batch and tokens, and return nothing beside it"
            )
        value = result.reshape(())
        gradient = None
        if value.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
            except RuntimeError as error:
                raise UnusableLoss(
                    f"the returned loss cannot be differentiated: {error}\n"
                    "  Return the loss without calling backward() on it, and without writing into tensors that its gradient "
                    "needs"
                ) from error
    attached = gradient is not None
    found = gradient if gradient is not None else torch.zeros_like(leaf)
    return Call(float(value.detach()), found.detach(), value.dtype, attached)


def adapted(loss: TokenLoss, vocab: int) -> TokenLoss:
    """The loss behind the kind of mask and of floats that it accepts: boolean and float64 if it can.

    Raises:
        UnusableLoss: if it accepts none of them; the error is that of the first.
    """
    batch, first = _random_batch(torch.ones(1, 3, dtype=torch.bool), vocab), None
    for logits in (torch.float64, torch.float32):
        for mask in (torch.bool, torch.float64, torch.int64):
            given = _converted(loss, logits, mask)
            try:
                call(given, batch)
            except UnusableLoss as error:
                first = first or error
            else:
                return given
    assert first is not None
    raise first


def _converted(loss: TokenLoss, logits: torch.dtype, mask: torch.dtype) -> TokenLoss:
    return lambda s, t, y, m: loss(s.to(logits), t.to(logits), y, m.to(logits if mask.is_floating_point else mask))


class Measured:
    """Value and gradient of a loss on every completion of a world, one completion a call.

    Attributes:
        values: (P,) per completion.
        rows: (P, H, V) gradient with respect to the logits at every step.
        states: (P, H) which state each step visits.
        tokens: (P, H) the drawn tokens.
        weights: (P,) probability of every completion under the student.

    Raises:
        UnusableLoss: for a loss that is not finite on ordinary logits, or cannot be called.
    """

    def __init__(self, loss: TokenLoss, world: TabularWorld) -> None:
        self.world = world
        self.states = torch.tensor([path.states for path in world.paths])
        self.tokens = torch.tensor([path.tokens for path in world.paths])
        self.weights = torch.tensor([path.student for path in world.paths], dtype=torch.float64)
        student, mask = world.student.detach(), torch.ones(1, world.horizon, dtype=torch.bool)
        calls = [
            call(loss, Batch(student[s][None], world.teacher[s][None], y[None], mask))
            for s, y in zip(self.states, self.tokens, strict=True)
        ]
        self.values = torch.tensor([c.value for c in calls], dtype=torch.float64)
        self.rows = torch.cat([c.gradient for c in calls])
        self.attached = any(c.attached for c in calls)
        self.tolerance = max(TOLERANCE.get(c.dtype, COARSE) for c in calls)
        if not (bool(self.values.isfinite().all()) and bool(self.rows.isfinite().all())):
            raise UnusableLoss(
                "the loss or its gradient is not finite on ordinary logits (standard normal): nothing can be measured.\n"
                f"  Called with {len(calls)} batches of one completion, logits {list(calls[0].gradient.shape)}; a variance "
                "over the batch needs more rows than one"
            )

    @property
    def mean(self) -> Tensor:
        """(S, V) expected gradient."""
        out = torch.zeros_like(self.world.teacher)
        return out.index_put((self.states,), self.weights[:, None, None] * self.rows, accumulate=True)

    @property
    def size(self) -> float:
        """Root of the expected squared norm of one completion's gradient: what "small" is measured by."""
        return float((self.weights * self.rows.square().sum((1, 2))).sum().sqrt())

    @property
    def trace(self) -> float:
        """Trace of the gradient's covariance."""
        return max(self.size**2 - float(self.mean.square().sum()), 0.0)

    @property
    def dead(self) -> bool:
        """Whether no completion has a gradient, up to rounding."""
        return float(self.rows.abs().max()) <= 1e-4 * self.tolerance * max(1.0, float(self.values.abs().max()))

    def score_weights(self) -> Tensor | None:
        """(P, H) the factors w of a gradient ``w_t * grad log p(y_t)``; None if it is not of that form."""
        law = self.world.student.detach().softmax(-1)[self.states]
        score = torch.nn.functional.one_hot(self.tokens, self.world.vocab).double() - law
        weights = (self.rows * score).sum(-1) / score.square().sum(-1)
        rest = (self.rows - weights[..., None] * score).abs().max()
        return weights if float(rest) <= self.tolerance * float(self.rows.abs().max()) else None


# ---- batches of several completions -----------------------------------------------------------------------------------------
def _random_batch(mask: Tensor, vocab: int, seed: int = 0) -> Batch:
    """Independent normal logits; the last token is never drawn."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *mask.shape, vocab, generator=generator, dtype=torch.float64)
    return Batch(student, teacher, torch.randint(vocab - 1, mask.shape, generator=generator), mask)


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal up to a relative tolerance; a gradient that is nothing but rounding counts as zero."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-5 * tolerance)


def _value_same(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * abs(expected) + 1e-5 * tolerance


class Padding(NamedTuple):
    """What masked positions do to a loss.

    Attributes:
        content: logits or tokens of masked positions move the loss or a gradient, or receive one.
        columns: masked columns at the end move the loss or a gradient.
        counted: they do so by being counted in a mean: gradients shrink by the share of real columns.
    """

    content: bool
    columns: bool
    counted: bool

    @property
    def leaks(self) -> bool:
        return self.content or self.columns


def probe_padding(loss: TokenLoss, vocab: int, tolerance: float) -> Padding:
    """Change what masked positions hold, before, between and behind the real ones; then append masked columns."""
    holes = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    base, other = _random_batch(holes, vocab), _random_batch(holes, vocab, seed=1)
    keep = holes[..., None]
    changed = Batch(
        base.student.where(keep, 3.0 * other.student),
        base.teacher.where(keep, 3.0 * other.teacher),
        base.tokens.where(holes, (base.tokens + 1) % (vocab - 1)),
        holes,
    )
    plain, moved = call(loss, base), call(loss, changed)
    content = not (
        _value_same(moved.value, plain.value, tolerance)
        and _same(moved.gradient[holes], plain.gradient[holes], tolerance)
        and not bool(plain.gradient[~holes].any() | moved.gradient[~holes].any())
    )
    ragged = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    short = _random_batch(ragged, vocab)
    more = _random_batch(torch.zeros(2, 3, dtype=torch.bool), vocab, seed=2)
    longer = Batch._make(torch.cat([a, b], 1) for a, b in zip(short, more, strict=True))
    before, after = call(loss, short), call(loss, longer)
    inner = after.gradient[:, :3][ragged]
    reference = before.gradient[ragged]
    columns = not (
        _value_same(after.value, before.value, tolerance)
        and _same(inner, reference, tolerance)
        and not bool(after.gradient[:, 3:].any())
    )
    return Padding(content, columns, counted=columns and _same(inner, 0.5 * reference, tolerance) and bool(reference.any()))


def probe_reduction(loss: TokenLoss, vocab: int, tolerance: float) -> str:
    """How completions and tokens are added up, from one completion, its first token alone, and a batch of both lengths."""
    whole = _random_batch(torch.ones(1, 3, dtype=torch.bool), vocab, seed=3)
    first = Batch._make(x[:, :1] for x in whole)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    both = Batch._make(torch.cat([x, x]) for x in whole)._replace(mask=mask)
    long, short, batch = (call(loss, b).gradient for b in (whole, first, both))
    chained = "no plain sum or mean: a token's weight depends on the other tokens"
    if not bool(long.any()) or not bool(short.any()):
        return chained

    def factor(found: Tensor, reference: Tensor) -> float | None:
        ratio = float((found * reference).sum() / reference.square().sum())
        return ratio if _same(found, ratio * reference, tolerance) else None

    found = (factor(short[0, 0], long[0, 0]), factor(batch[0], long[0]), factor(batch[1, :1], short[0]))
    for pattern, name in REDUCTIONS.items():
        if all(f is not None and abs(f - p) <= 10 * tolerance for f, p in zip(found, pattern, strict=True)):
            return name
    return chained


REDUCTIONS = {
    (1.0, 1.0, 1.0): "sum over all tokens",
    (1.0, 0.5, 0.5): "sum over a completion's tokens, mean over completions",
    (3.0, 0.5, 0.5): "mean over a completion's tokens, mean over completions",
    (3.0, 1.0, 1.0): "mean over a completion's tokens, sum over completions",
    (3.0, 0.75, 0.25): "mean over all tokens of the batch",
    (3.0, 0.5, 1 / 6): "mean over all positions of the batch, padding included",
}
"""(first token alone, long row in a batch, short row in a batch) relative to each completion alone -> how it is added up."""

ONLY = {"student": "student only", "teacher": "teacher only", "both": "both"}


def probe_infinity(loss: TokenLoss, vocab: int) -> dict[str, str]:
    """What minus infinity in a column that is never sampled does: ``ok`` or what breaks, for student, teacher and both.

    With both at minus infinity the token does not exist, so the loss must be that of the vocabulary without it.
    """
    base = _random_batch(torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool), vocab, seed=4)
    out = {}
    for who in ONLY:
        student, teacher = base.student.clone(), base.teacher.clone()
        if who != "teacher":
            student[..., -1] = -torch.inf
        if who != "student":
            teacher[..., -1] = -torch.inf
        try:
            found = call(loss, base._replace(student=student, teacher=teacher))
        except UnusableLoss as error:
            out[who] = str(error).partition("\n")[0]
            continue
        if found.value != found.value:
            out[who] = "the loss is NaN"
        elif not bool(found.gradient.isfinite().all()):
            out[who] = "the gradient is NaN" if bool(found.gradient.isnan().any()) else "the gradient is infinite"
        else:
            out[who] = "ok"
        if who == "both" and out[who] == "ok" and not _like_without(loss, base, found):
            out[who] = "not the loss without that token"
    return out


def _like_without(loss: TokenLoss, base: Batch, found: Call) -> bool:
    """Whether a loss at minus infinity is the loss of the smaller vocabulary."""
    try:
        without = call(loss, base._replace(student=base.student[..., :-1], teacher=base.teacher[..., :-1]))
    except UnusableLoss:  # a top-k as large as the vocabulary has no smaller one
        return True
    near = 1e-6 if found.dtype == torch.float64 else 1e-3
    return _value_same(found.value, without.value, near) and _same(found.gradient[..., :-1], without.gradient, near)
