"""What can be read off completions alone: how much they repeat themselves, and each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.metrics.token_mean import TokenMean

BITS = 21
"""Of a token id: three of them fit into one int64, and no vocabulary has two million entries."""


def ngrams(ids: Tensor, n: int) -> Tensor:
    """A number for every n-gram of a completion (L,), equal where the n-grams are.

    Args:
        ids: tokens.
        n: 1 to 3.

    >>> ngrams(torch.tensor([7, 8, 7, 8]), 2).unique().numel()
    2
    """
    if len(ids) < n:
        return ids.new_empty(0, dtype=torch.int64)
    places = 2 ** (BITS * torch.arange(n, device=ids.device))
    return (ids.long().unfold(0, n, 1) * places).sum(-1)


def _of_each(completions: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
    """N-grams of many completions in one line, and the number of the completion of each."""
    ids = torch.cat([completions[0][:0], *completions])
    lengths = torch.tensor([len(c) for c in completions], device=ids.device)
    row = torch.arange(len(completions), device=ids.device).repeat_interleave(lengths, output_size=len(ids))
    codes = ngrams(ids, n)
    within = row[: len(codes)] == row[len(ids) - len(codes) :]  # the others begin in one completion and end in the next
    return codes[within], row[: len(codes)][within]


def repeated(completions: Sequence[Tensor], n: int = 3) -> Tensor:
    """(B,) float64, the share of each completion's n-grams that stood in it before; NaN for fewer than n tokens.

    Args:
        completions: one or more, tokens (L,) of each.
        n: 1 to 3.

    >>> repeated([torch.tensor([5, 5, 5, 5]), torch.tensor([5, 6])], n=1).tolist()
    [0.75, 0.0]
    """
    codes, row = _of_each(completions, n)
    kinds = codes.unique(return_inverse=True)[1]
    distinct = (row * len(codes) + kinds).unique().div(max(len(codes), 1), rounding_mode="floor")
    of_row, all_of_row = (x.bincount(minlength=len(completions)).double() for x in (distinct, row))
    return 1.0 - of_row / all_of_row


class _OfNGrams:
    def check(self, n: int) -> int:
        if not 1 <= n <= 3:
            raise ValueError(f"{type(self).__name__}(n={n}): n must be 1, 2 or 3")
        return n


class Repetition(_OfNGrams, TokenMean):
    """Share of a completion's n-grams that stood in it before, mean over completions; towards 1 in a loop. A completion of
    fewer than n tokens has none and does not count. Rises from 0.51 to 0.998 in the collapse of arXiv 2605.11182 (n = 3).

    Args:
        n: 1 to 3.

    >>> metric = Repetition(n=1)
    >>> metric.update([torch.tensor([5, 5, 5, 5])]); metric.compute().item()
    0.75
    """

    def __init__(self, n: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = self.check(n)

    def update(self, completions: Sequence[Tensor]) -> None:  # type: ignore[override]
        if completions:
            super().update(repeated(completions, self.n).to(self.total.device))


class DistinctNGrams(_OfNGrams, Metric):
    """Distinct n-grams over all n-grams of all completions together (Li et al. 2016, arXiv 1510.03055): falls where the student
    writes the same text to every prompt. It depends on how much text there is: compare equal batches alone.

    Args:
        n: 1 to 3.

    >>> metric = DistinctNGrams(n=1)
    >>> metric.update([torch.tensor([5, 6])]); metric.update([torch.tensor([5, 6])]); metric.compute().item()
    0.5
    """

    full_state_update = False
    codes: list[Tensor]
    count: Tensor

    def __init__(self, n: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = self.check(n)
        self.add_state("codes", [], dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, completions: Sequence[Tensor]) -> None:
        if completions:
            found = _of_each(completions, self.n)[0].to(self.count.device)
            self.count += len(found)
            self.codes.append(found.unique())

    def compute(self) -> Tensor:
        """NaN if there was nothing."""
        codes = self.codes if isinstance(self.codes, Tensor) else torch.cat(self.codes)
        share: Tensor = codes.unique().numel() / self.count
        return share.float()


class Leak(_OfNGrams, TokenMean):
    """Share of a completion's n-grams that stand in the teacher's prompt and not in the student's, mean over completions: text
    that only the teacher was shown. Completions of fewer than n tokens, and teachers that read nothing more, do not count.

    Some of them are there by chance, or because they are right. So it is read against its control, the same with what the
    teacher was told about another prompt (`told_elsewhere`), and against its own value at the first step.

    Args:
        n: 1 to 3.

    >>> metric = Leak(n=1)
    >>> metric.update([torch.tensor([7, 8])], [torch.tensor([1, 8, 9])], [torch.tensor([1])]); metric.compute().item()
    0.5
    """

    def __init__(self, n: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = self.check(n)

    def update(  # type: ignore[override]
        self, completions: Sequence[Tensor], told: Sequence[Tensor], prompts: Sequence[Tensor]
    ) -> None:
        """One tensor of ids (L,) a row: what the student wrote, what the teacher reads before it, what the student reads."""
        shares = []
        for rows in zip(completions, told, prompts, strict=True):
            written, theirs, ours = (ngrams(ids, self.n) for ids in rows)
            secret = theirs[~torch.isin(theirs, ours)]
            known = len(written) and len(secret)
            shares.append(torch.isin(written, secret).double().mean().item() if known else torch.nan)
        super().update(torch.tensor(shares, dtype=torch.float64, device=self.total.device))


def told_elsewhere(indices: Sequence[int], told: Sequence[Tensor]) -> list[Tensor]:
    """What the teacher was told about another prompt, for every row: that of the next row with another index. Empty for all if
    there is only one prompt.

    >>> [t.tolist() for t in told_elsewhere([4, 4, 5], [torch.tensor([1]), torch.tensor([2]), torch.tensor([3])])]
    [[3], [3], [1]]
    """
    out = []
    for row, index in enumerate(indices):
        others = (told[(row + step) % len(told)] for step in range(1, len(told)) if indices[(row + step) % len(told)] != index)
        out.append(next(others, told[row][:0]))
    return out
