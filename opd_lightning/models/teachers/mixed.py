"""Teachers made of several laws: mixtures, a router, a trust region around the start, a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opd_lightning import parallel
from opd_lightning.models.students import Student
from opd_lightning.models.teachers.base import StartTeacher, Teacher, blind
from opd_lightning.models.teachers.moving import LiveTeacher
from opd_lightning.types import Prompt, Rendering, TableLaws, TokenLaws

__all__ = ["EnsembleTeacher", "FunctionTeacher", "RoutedTeacher", "TrustRegionTeacher"]

Mean = Literal["arithmetic", "geometric"]
LEAST = -1e4
"""Log-probability that stands for -inf where two laws are subtracted."""
BISECTIONS = 24
"""Halvings of [0, weight]: the trust region's weight is found to within 2^-24 of it."""


def mixed_logprobs(logits: Sequence[Tensor], weights: Sequence[float], mean: Mean) -> Tensor:
    """Logits of a weighted mean of laws.

    ``log sum_k w_k p_k`` for the arithmetic mean, ``sum_k w_k log p_k`` (unnormalised) for the geometric one.

    Args:
        logits: (N, V) each.
        weights: positive, one a law, with sum 1.
        mean: in probability space, or in log-probability space.

    >>> two = [torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()]
    >>> mixed_logprobs(two, [0.5, 0.5], "arithmetic").exp().tolist()
    [[0.5, 0.5]]
    """
    laws = torch.stack([x.float().log_softmax(-1) if x.dtype.itemsize < 4 else x.log_softmax(-1) for x in logits])
    shares = torch.tensor(weights, dtype=laws.dtype, device=laws.device)[:, None, None]
    return (laws + shares.log()).logsumexp(0) if mean == "arithmetic" else (shares * laws).sum(0)


@dataclass(frozen=True)
class MixedLaws:
    """A weighted mean of laws, made chunk by chunk. See `opd_lightning.types.TokenLaws`."""

    members: tuple[TokenLaws, ...]
    weights: tuple[float, ...]
    mean: Mean

    def __len__(self) -> int:
        return len(self.members[0])

    @property
    def vocab(self) -> int:
        return self.members[0].vocab

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        return mixed_logprobs([m.logits(start, stop) for m in self.members], self.weights, self.mean)


class Composite(Teacher):
    """A teacher that only combines others."""

    writes = False
    members: dict[str, Teacher]

    def check(self, student: Student) -> None:
        for member in self.members.values():
            member.check(student)

    def leaves(self) -> dict[str, Teacher]:
        return {
            f"{name}.{inner}" if inner else name: leaf
            for name, member in self.members.items()
            for inner, leaf in member.leaves().items()
        }

    def processor(self, student: Student) -> Any:
        found = [leaf.processor(student) for leaf in self.leaves().values()]
        if any(p.to_json_string() != found[0].to_json_string() for p in found):
            raise ValueError(
                f"the teachers that {type(self).__name__} holds make different tensors of an image (data.prompts): give it "
                "models with one processor (model.teacher)"
            )
        return found[0]

    @property
    def moving(self) -> str:
        return "; ".join(dict.fromkeys(m.moving for m in self.members.values() if m.moving))

    @property
    def starts_as_student(self) -> bool:  # type: ignore[override]
        return all(m.starts_as_student for m in self.members.values())

    @property
    def known(self) -> int | None:
        return min((m.known for m in self.members.values() if m.known is not None), default=None)

    def _refuse(self, unfit: type[Teacher] | tuple[type[Teacher], ...]) -> None:
        for name, member in self.members.items():
            if isinstance(member, unfit) or not member.answers:
                raise ValueError(f"{type(self).__name__} cannot hold {type(member).__name__} ({name!r}): give it networks")


class EnsembleTeacher(Composite):
    """A weighted mean of several teachers' laws, one forward pass of each.

    ``arithmetic`` is the mixture ``sum_k w_k p_k``: wherever one teacher puts mass, it has some. ``geometric`` is the
    normalised ``prod_k p_k^w_k``: the law whose weighted sum of reverse KLs to all teachers is smallest, and 0 where one
    teacher has 0. It scores text but cannot write any. The objective's temperature is applied to the mean, not to its members.

    Args:
        teachers: the members.
        weights: positive, one a member; divided by their sum. null weighs all alike.
        mean: of the laws.

    Raises:
        ValueError: for fewer than two members, or weights that do not fit.
    """

    def __init__(self, teachers: list[Teacher], weights: list[float] | None = None, mean: Mean = "arithmetic") -> None:
        weights = [1.0] * len(teachers) if weights is None else weights
        if len(teachers) < 2 or len(weights) != len(teachers) or min(weights) <= 0.0:
            raise ValueError(
                f"EnsembleTeacher has {len(teachers)} teachers and weights {weights}: give two teachers or more and one "
                "positive weight for each (model.teacher.weights)"
            )
        if mean not in ("arithmetic", "geometric"):
            raise ValueError(f"EnsembleTeacher(mean={mean!r}): allowed are arithmetic, geometric")
        self.members = {str(i): teacher for i, teacher in enumerate(teachers)}
        self.weights = tuple(w / sum(weights) for w in weights)
        self.mean = mean
        self._refuse(RoutedTeacher)
        if self.known is not None:
            raise ValueError("EnsembleTeacher needs its members' whole laws: a ServerTeacher tells the likeliest entries alone")

    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TokenLaws:
        return MixedLaws(tuple(m.laws(student, text, vocab) for m in self.members.values()), self.weights, self.mean)


@dataclass(frozen=True)
class RoutedLaws:
    """Laws of N tokens, each answered by one of several members.

    Attributes:
        members: the laws of each one's own tokens, in their order; None for one that has none.
        owner: (N,) the member of each token.
    """

    members: tuple[TokenLaws | None, ...]
    owner: Tensor
    vocab: int

    def __len__(self) -> int:
        return len(self.owner)

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        owner, parts = self.owner[start:stop], []
        for number, member in enumerate(self.members):
            before = int((self.owner[:start] == number).sum())
            mine = int((owner == number).sum())
            if member is not None and mine:
                parts.append((owner == number, member.logits(before, before + mine)))
        dtype = max((part.dtype for _, part in parts), key=lambda d: d.itemsize, default=torch.float32)
        out = torch.empty(len(owner), self.vocab, dtype=dtype, device=owner.device)
        for rows, part in parts:
            out[rows] = part.to(dtype)
        return out


class RoutedTeacher(Composite):
    """A column of the data says which teacher answers, and writes, for a row: multi-teacher distillation, an expert a domain.

    Under fsdp2 every rank asks every expert in every micro-batch, because their layers are gathered together.

    Args:
        teachers: name -> teacher.
        column: of the rows, holding one of the names.
        default: the teacher of rows without that column or with another name; null refuses them.

    Raises:
        ValueError: for no teachers, or a default that is not among them.
    """

    routes = True

    def __init__(self, teachers: dict[str, Teacher], column: str = "domain", default: str | None = None) -> None:
        if not teachers or (default is not None and default not in teachers):
            raise ValueError(f"RoutedTeacher(default={default!r}): must be one of its teachers: {', '.join(teachers)}")
        self.members, self.column, self.default = dict(teachers), column, default
        self.writes = all(t.writes for t in teachers.values())
        self._refuse(RoutedTeacher)

    def _name(self, prompt: Prompt) -> str:
        found = prompt.fields.get(self.column)
        if str(found) in self.members:
            return str(found)
        if self.default is None:
            raise ValueError(
                f"prompt {prompt.index} has {self.column}={found!r}, but the teachers are {', '.join(self.members)}: correct "
                "the rows, or set model.teacher.column or model.teacher.default"
            )
        return self.default

    def route(self, prompt: Prompt) -> int:
        return list(self.members).index(self._name(prompt))

    def writer(self, prompt: Prompt) -> Teacher:
        return self.members[self._name(prompt)]

    def prepare(self, text: Rendering) -> None:
        assert text.route is not None
        for number, member in enumerate(self.members.values()):
            member.prepare(text.select((text.route == number).nonzero().squeeze(-1)))

    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TokenLaws:
        if text.route is None:
            raise ValueError("RoutedTeacher needs a rollout with routes: join prompts and completions with OPDModule.join")
        members = []
        for number, member in enumerate(self.members.values()):
            rows = (text.route == number).nonzero().squeeze(-1)
            owns = [own for leaf in member.leaves().values() if (own := leaf.own_model()) is not None]
            cut = any(parallel.is_cut(own) for own in owns)
            asked = text.select(rows if len(rows) or not cut else rows.new_zeros(1))
            members.append(member.laws(student, asked, vocab) if len(asked.ids) else None)
        owner = text.route[:, None].expand_as(text.mask)[text.mask]
        return RoutedLaws(tuple(members), owner, vocab)


@dataclass(frozen=True)
class TrustRegionLaws:
    """``start^(1-a) student^a`` at every token, with the largest a <= weight that keeps it within ``max_kl`` of the start."""

    start: TokenLaws
    student: TokenLaws
    weight: float
    max_kl: float | None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def vocab(self) -> int:
        return self.start.vocab

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        fixed, live = (law.logits(start, stop).float().log_softmax(-1) for law in (self.start, self.student))
        shift = torch.where(fixed.isneginf(), 0.0, live.clamp(min=LEAST) - fixed)
        high = torch.full((len(fixed), 1), self.weight, device=fixed.device)
        bound = self.max_kl
        if bound is None:
            return fixed + high * shift

        def inside(share: Tensor) -> Tensor:  # the divergence grows with the share: its slope is share * variance of shift
            moved = (fixed + share * shift).log_softmax(-1)
            gap = torch.where(fixed.isneginf(), 0.0, moved - fixed)
            return (moved.exp() * gap).sum(-1, keepdim=True) <= bound

        low = torch.where(inside(high), high, torch.zeros_like(high))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = torch.where(inside(middle), middle, low), torch.where(inside(middle), high, middle)
        return fixed + low * shift


class TrustRegionTeacher(StartTeacher):
    """The student of this step, held near the student of the start: their geometric mixture, in the teacher's context.

    ``log teacher = (1 - a) log start + a log student + constant``, which is the law nearest to the student among those within a
    KL of the start. With a fixed a it is the mixing of logits of SDPO (arXiv 2601.20802, released code; second-hand: we know
    its form, not its default); with ``max_kl`` every token gets the largest a that keeps KL(teacher ‖ start) within the bound.

    Args:
        weight: a, the student's share in the exponent, in (0, 1]; with ``max_kl`` the largest a.
        max_kl: bound on KL(teacher ‖ start) at every token, in nats, 0 excluded; null has no bound but the weight.

    Raises:
        ValueError: for values out of range.
    """

    writes = False

    def __init__(self, weight: float = 0.05, max_kl: float | None = None) -> None:
        super().__init__()
        if not 0.0 < weight <= 1.0 or (max_kl is not None and max_kl <= 0.0):
            raise ValueError(
                f"TrustRegionTeacher(weight={weight}, max_kl={max_kl}): the weight must lie in (0, 1], max_kl must be positive"
            )
        self.weight, self.max_kl = weight, max_kl

    @property
    def moving(self) -> str:
        bound = f" and KL(teacher ‖ start) <= {self.max_kl:g} nat a token" if self.max_kl is not None else ""
        return f"the teacher follows the student with weight {self.weight:g}{bound}: its aim moves inside a trust region"

    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TokenLaws:
        live = LiveTeacher().laws(student, text, vocab)
        return TrustRegionLaws(super().laws(student, text, vocab), live, self.weight, self.max_kl)


class FunctionTeacher(Teacher):
    """A function is the teacher: for tests, and for science where the target is known in closed form.

    Args:
        function: called with token ids (B, L), right-padded, and the size V of the vocabulary; returns log-probabilities
            (B, L - 1, V) of the tokens behind each position. A module-level function, so that YAML and checkpoints can name it.

    Raises:
        ValueError: in `laws`, for a result of another shape, naming both.
    """

    writes = False

    def processor(self, student: Student) -> Any:
        raise blind(self)

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        self.function = function

    @torch.no_grad()
    def laws(self, student: nn.Module, text: Rendering, vocab: int) -> TokenLaws:
        found = self.function(text.ids, vocab)
        if found.shape != (*text.mask.shape, vocab):
            raise ValueError(
                f"model.teacher.function returned {tuple(found.shape)}, expected (B, L - 1, V) = {(*text.mask.shape, vocab)}"
            )
        ours = next(student.parameters(), found).dtype  # an objective compares laws of one width
        return TableLaws(found[text.mask].to(ours if ours.itemsize >= 4 else torch.float32))
