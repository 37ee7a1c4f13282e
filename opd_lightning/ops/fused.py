"""A row-wise loss on a language model's logits, without the logits.

The head multiplies a tile of tokens, a cache-sized block of rows at a time becomes values and its own gradient, and the
gradient takes the logits' place in memory. So two tiles (one a model), the logit gradients of some tiles of a trained head and
its weight gradient are all that is ever alive, whatever the number of tokens, and every logit is computed once: the gradient
is made in the forward pass for the factors that the caller expects, and made again in the backward pass only where it expected
none or wrong ones.

Weight gradients are summed in float32 at least: a sum in bfloat16 would lose what late tokens add to it. Adding to such a sum
moves 8 bytes a weight, so it is done once for many tokens, and not at all where these are all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from opd_lightning.ops.heads import Head

TILE = 3 * 2**23
"""Logits of one model that are alive at once beside a weight gradient: 48 MiB in bfloat16. Twice as many where none is made."""

TOKENS = 256
"""Tiles hold a multiple of so many tokens, however large the vocabulary: with 165 of 151 936 entries products took 1.2 x as
long a token, since each tile reads the whole weight."""

GATHERED = 2**11
"""Bytes that each entry of a vocabulary (of at least 49 152) may take of logit gradients of a trained head: 1 024 tokens in
bfloat16."""

ROWS = 256
"""Tokens whose gradient is multiplied with the weight at a time on a CPU: with 1024 of a vocabulary of 49 152 it takes 1.6 x as
long."""

BLOCK = 2**19
"""Logits whose values and gradient are made at a time on a CPU: their float32 temporaries (2 MiB each) stay in its cache."""

PIECE = 512
"""Vocabulary rows of the weight gradient that are multiplied and added at a time."""


def tokens_at_once(tokens: int, vocab: int, dtype: torch.dtype, gathers: bool) -> tuple[int, int]:
    """Tokens of a tile, and those whose logit gradients wait for one product with the hidden states.

    Args:
        tokens: of the batch.
        vocab: rows of the head.
        dtype: of its products.
        gathers: whether it is a matrix that is trained.

    >>> tokens_at_once(512, 151_936, torch.bfloat16, gathers=True), tokens_at_once(8192, 151_936, torch.bfloat16, gathers=True)
    ((512, 512), (256, 1024))
    """
    tile = gathered = max(1, (TILE if gathers else 2 * TILE) // vocab // TOKENS) * TOKENS
    if gathers:
        most = max(GATHERED, 4 * TILE // vocab) // dtype.itemsize
        tile = tokens if tokens <= most else tile
        gathered = tokens if tokens <= most else max(most // tile, 1) * tile
    return min(tile, tokens), min(gathered, tokens)


class Scored(NamedTuple):
    """What is left of some rows.

    Attributes:
        outputs: (n,) each; the loss is made of them.
        measured: (n,) each, without gradient.
        gradient: (n, V) of ``sum(factors * outputs)`` with respect to the logits; None if no factors were given.
    """

    outputs: list[Tensor]
    measured: dict[Hashable, Tensor]
    gradient: Tensor | None = None


@runtime_checkable
class Rows(Protocol):
    """A loss that looks at one token's logits at a time; their gradient may take their place."""

    def load(self, start: int, stop: int, gradient_only: bool) -> tuple[Tensor, ...]:
        """(n, V) logits of other models for these tokens. ``gradient_only``: nothing but gradients will be asked of them."""

    def score(
        self, logits: Tensor, others: Sequence[Tensor], start: int, stop: int, factors: Sequence[Tensor | None] | None
    ) -> Scored:
        """Outputs and measurements of these tokens; with factors (one (n,) tensor an output, None for 0) the gradient too."""

    def measure(self, logits: Tensor, others: Sequence[Tensor], start: int, stop: int) -> Scored:
        """The same with autograd's graph behind the outputs, and no gradient of its own."""


def score_rows(
    hidden: Float[Tensor, "N D"],
    head: Head,
    rows: Rows,
    expected: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], dict[Hashable, Tensor]]:
    """Outputs of every token, differentiable with respect to the hidden states and the head, and measurements.

    Args:
        hidden: states at N tokens.
        head: of the same model.
        rows: what is computed from the logits.
        expected: the gradient that each output is expected to get, up to one common factor; None if nobody knows. A wrong
            guess costs time, never correctness.

    Returns:
        (N,) outputs, and (N,) measurements by name.
    """
    if len(hidden) * head.vocab <= BLOCK:  # nothing to save
        scored = rows.measure(head(hidden), rows.load(0, len(hidden), False), 0, len(hidden))
        return scored.outputs, scored.measured
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if hidden.dtype == torch.float16 and expected is not None:
        expected = _at_most_one(expected)
    autocast = torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
    work = _Work(head, rows, expected if torch.is_grad_enabled() else None, autocast)
    if not head.plain:
        work.random = torch.get_rng_state(), *get_device_states(hidden)
    outputs = _Fused.apply(hidden, work, *head.trained)
    return list(outputs), work.measured


class Gradients(NamedTuple):
    """What a pass over the tokens leaves behind it.

    Attributes:
        hidden: of the hidden states; None if it was not wanted.
        parameters: of the head's parameters, in float32 or wider if summed over tiles.
        room: memory that the tiles had, in the shape and the precision of the weight.
    """

    hidden: Tensor | None
    parameters: list[Tensor]
    room: Tensor | None

    def times(self, size: float, trained: Sequence[Tensor]) -> Gradients:
        """The same, ``size`` times as large; the memory is reused."""
        pairs = zip(self.parameters, trained, strict=True)  # scaled, they may not fit into float16
        parameters = [g.to(torch.promote_types(g.dtype, p.dtype)).mul_(size) for g, p in pairs]
        return Gradients(None if self.hidden is None else self.hidden.mul_(size), parameters, self.room)

    def rounded(self, trained: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' gradients in the precision of the parameters."""
        room = self.room
        return [
            room.copy_(g) if room is not None and (room.shape, room.dtype) == (p.shape, p.dtype) else g.to(p.dtype)
            for g, p in zip(self.parameters, trained, strict=True)
        ]


class _Work:
    """The tile loop, and what it leaves."""

    def __init__(self, head: Head, rows: Rows, expected: Sequence[Tensor | None] | None, autocast: torch.autocast) -> None:
        self.head, self.rows, self.expected = head, rows, expected
        self.outputs: list[Tensor] = []
        self.measured: dict[Hashable, Tensor] = {}
        self.ready: Gradients | None = None
        self.autocast = autocast
        self.random: tuple[Tensor, list[int], list[Tensor]] | None = None  # for dropout in an adapted head

    def run(
        self, hidden: Tensor, factors: Sequence[Tensor | None] | None, wanted: bool, outputs_wanted: bool
    ) -> tuple[list[Tensor], Gradients]:
        """One pass over the tokens.

        Args:
            hidden: (N, D).
            factors: of the outputs' gradient; None makes no gradient.
            wanted: whether the hidden states' gradient is needed.
            outputs_wanted: False in the backward pass.

        Returns:
            outputs, and what the factors make of them.
        """
        gathers = self.head.plain and bool(self.head.trained) and factors is not None
        tile, gathered = tokens_at_once(len(hidden), _width(self.head), hidden.dtype, gathers)
        product = _Product(self.head, hidden, wanted and factors is not None, gathers, gathered)
        block = tile
        if hidden.device.type == "cpu":
            block = max(1, BLOCK // self.head.vocab)
            block += block % 2 if block > 1 else 0  # rows are shared out among the cores
        for start in range(0, len(hidden), tile):
            stop = min(start + tile, len(hidden))
            values = product.forward(start, stop)
            others: tuple[Tensor, ...] = self.rows.load(start, stop, not outputs_wanted)
            for a in range(start, stop, block):
                b = min(a + block, stop)
                at = slice(a - start, b - start)
                own = [f if f is None else f[a:b] for f in factors] if factors is not None else None
                scored = self._block(values[at], [o[at] for o in others], a, b, own)
                if outputs_wanted:
                    self._keep(scored, a, b, len(hidden))
            others = ()  # makes room for the next tile
            if factors is not None:
                product.backward(values, start, stop)
        outputs, self.outputs = self.outputs, []
        return outputs, Gradients(product.of_hidden, product.of_parameters, product.room)

    def _keep(self, scored: Scored, a: int, b: int, count: int) -> None:
        """Copy a block's results to their place: left as they are, they would split the memory that the block frees."""
        if a == 0:
            self.outputs = [part.new_empty(count) for part in scored.outputs]
            self.measured = {key: part.new_empty(count) for key, part in scored.measured.items()}
        for whole, part in zip(self.outputs, scored.outputs, strict=True):
            whole[a:b] = part
        for key, part in scored.measured.items():
            self.measured[key][a:b] = part

    def again(self, hidden: Tensor, factors: Sequence[Tensor | None], wanted: bool) -> Gradients:
        """The gradients for these factors, in a pass of their own."""
        devices = self.random[1] if self.random is not None else []
        with torch.random.fork_rng(devices, enabled=self.random is not None), self.autocast:
            if self.random is not None:
                torch.set_rng_state(self.random[0])
                set_device_states(*self.random[1:])
            return self.run(hidden, factors, wanted, False)[1]

    def _block(self, values: Tensor, others: list[Tensor], a: int, b: int, factors: list[Tensor | None] | None) -> Scored:
        """Score some rows and overwrite their matrix product with its gradient."""
        if self.head.bare:
            scored = self.rows.score(values[:, : self.head.vocab], others, a, b, factors)
            gradient = scored.gradient
        else:
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                logits = self.head.finish(leaf)
            scored = self.rows.score(logits.detach().clone(), others, a, b, factors)  # autograd may need them
            gradient = scored.gradient
            if gradient is not None:
                (gradient,) = torch.autograd.grad(logits, leaf, gradient.to(logits.dtype))
        if gradient is not None:
            if gradient.data_ptr() != values.data_ptr():
                values[:, : gradient.shape[1]] = gradient
            values[:, gradient.shape[1] :] = 0
        return scored


class _Product:
    """The head's matrix product, tile by tile, forwards and backwards."""

    def __init__(self, head: Head, hidden: Tensor, of_hidden: bool, of_weight: bool, gathered: int) -> None:
        self.head, self.hidden, self.of_weight, self.gathered = head, hidden, of_weight, gathered
        self.of_hidden = torch.empty_like(hidden) if of_hidden else None
        self.trained = head.trained
        self.of_parameters: list[Tensor] = []
        self._graph: tuple[Tensor, Tensor] | None = None
        self._buffer: Tensor | None = None
        self.room: Tensor | None = None
        module: Any = head.module
        self.weight: Tensor | None = module.weight.detach().to(hidden.dtype) if head.plain else None
        self.bias: Tensor | None = module.bias if head.plain else None

    def forward(self, start: int, stop: int) -> Tensor:
        """(n, R) products of a tile; they may be overwritten."""
        states = self.hidden[start:stop]
        if self.weight is not None:
            if self._buffer is None:
                self._buffer = self._reserve(*self.weight.shape)
            at = start % self.gathered
            values = torch.mm(states, self.weight.t(), out=self._buffer[at : at + len(states)])
            return values if self.bias is None else values.add_(self.bias.detach())
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            product: Tensor = self.head.module(leaf)
        self._graph = leaf, product
        return product.detach().clone()

    def _reserve(self, vocab: int, width: int) -> Tensor:
        """(gathered, R) memory for the products, behind that for the parameters' gradients.

        What is asked for between two tiles is found where the first one was, or beside it, as the heap has it; then the second
        tile is found elsewhere, and both count. A sum is rounded into the memory of the products for the same reason.
        """
        rows = min(self.gathered, len(self.hidden))
        summed = rows < len(self.hidden)
        if self.of_weight:
            kinds = [_wide(p.dtype) if summed or p.ndim == 1 else self.hidden.dtype for p in self.trained]
            self.of_parameters = [p.new_empty(p.shape, dtype=kind) for p, kind in zip(self.trained, kinds, strict=True)]
        if not self.of_weight or not summed or self.hidden.dtype == _wide(self.hidden.dtype) or 2 * width < rows:
            return self.hidden.new_empty(rows, vocab)
        memory = self.hidden.new_empty(max(rows, width) * vocab)
        self.room = memory[: vocab * width].view(vocab, width)
        return memory[: rows * vocab].view(rows, vocab)

    def backward(self, gradient: Tensor, start: int, stop: int) -> None:
        """Carry a tile's gradient on to its hidden states and to the parameters."""
        if self.weight is None:
            assert self._graph is not None
            leaf, values = self._graph
            of_leaf, *of_parameters = torch.autograd.grad(
                values, [leaf, *self.trained], gradient, allow_unused=True, materialize_grads=True
            )
            if self.of_hidden is not None:
                self.of_hidden[start:stop] = of_leaf
            if not self.of_parameters:
                self.of_parameters = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in self.trained]
            for total, part in zip(self.of_parameters, of_parameters, strict=True):
                total += part
            return
        if self.of_hidden is not None:
            step = ROWS if gradient.is_cpu else len(gradient)
            for a in range(start, stop, step):
                b = min(a + step, stop)
                torch.mm(gradient[a - start : b - start], self.weight, out=self.of_hidden[a:b])
        if self.of_weight and (stop % self.gathered == 0 or stop == len(self.hidden)):
            self._weigh((stop - 1) // self.gathered * self.gathered, stop)

    def _weigh(self, start: int, stop: int) -> None:
        """Carry the gathered logit gradients of these tokens on to the parameters."""
        assert self._buffer is not None
        gradient, states = self._buffer[: stop - start], self.hidden[start:stop]
        put = Tensor.add_ if start else Tensor.copy_
        for parameter, total in zip(self.trained, self.of_parameters, strict=True):
            if parameter.ndim == 1:
                put(total, gradient.sum(0, dtype=total.dtype))
            elif len(gradient) == len(self.hidden):  # nothing to sum
                torch.mm(gradient.t(), states, out=total)
            else:
                for a in range(0, len(total), PIECE):
                    put(total[a : a + PIECE], torch.mm(gradient[:, a : a + PIECE].t(), states))


class _Fused(torch.autograd.Function):
    """Outputs whose gradient is already there, or is computed when it is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, *trained: Tensor) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[0] or bool(trained)
        factors = work.expected if needed else None
        outputs, found = work.run(hidden, factors, ctx.needs_input_grad[0], True)
        if factors is not None:
            work.ready = found
        ctx.work = work
        ctx.save_for_backward(hidden)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor | None) -> tuple[Any, ...]:
        work: _Work = ctx.work
        (hidden,) = ctx.saved_tensors
        found, work.ready = work.ready, None  # a second backward pass computes it again
        size = _common_factor(factors, work.expected) if found is not None else None
        if found is None or size is None:
            found = None  # makes room for the right ones
            found = work.again(hidden, factors, ctx.needs_input_grad[0])
        elif size != 1.0:
            found = found.times(size, work.head.trained)
        return found.hidden, None, *found.rounded(work.head.trained)


def _common_factor(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None] | None) -> float | None:
    """The number r with ``actual = r * expected``; None if there is none."""
    if expected is None:
        return None
    size: float | None = None
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            if (a is None or not bool(a.any())) and (e is None or not bool(e.any())):
                continue
            return None
        at = e.abs().argmax() if len(e) else 0
        if len(e) == 0 or not bool(e.any()):
            if bool(a.any()):
                return None
            continue
        ratio = float(a[at]) / float(e[at])
        close = 1e-12 if a.dtype == torch.float64 else 1e-6
        same = size is None or abs(ratio - size) <= close * abs(size)  # each was rounded by itself
        if not same or not torch.allclose(a.to(e.dtype), ratio * e, rtol=close, atol=0.0):
            return None
        size = ratio if size is None else size
    return 1.0 if size is None else size


def _at_most_one(expected: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same up to a common factor: gradients of a mean over many tokens vanish in float16 before the loss scale is known."""
    sizes = [e.abs().max() for e in expected if e is not None]
    largest = torch.stack(sizes).max() if sizes else torch.ones(())
    return [e if e is None else e / largest.where(largest > 0, 1.0) for e in expected]


def _width(head: Head) -> int:
    weight = getattr(head.module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else head.vocab


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
