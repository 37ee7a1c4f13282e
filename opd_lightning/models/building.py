"""The networks of a run: built whole in every process, or read by the first one, from which the others receive their shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from opd_lightning import parallel
from opd_lightning.models.attention import NAME as PACKED
from opd_lightning.models.distributions import become_packed, pack_rows, prove_head
from opd_lightning.models.loading import hollow
from opd_lightning.models.lora import base_of
from opd_lightning.models.students import Student
from opd_lightning.models.teachers import Teacher


def networks_of(student: nn.Module, leaves: Sequence[Teacher]) -> list[nn.Module]:
    """The student, then the teachers' own networks."""
    return [student, *(own for leaf in leaves if (own := leaf.own_model()) is not None)]


def build_all(recipe: Student, leaves: Sequence[Teacher], packed: bool, share: bool) -> nn.Module:
    """Student and teachers with all their weights, proven to be what this package takes them for; returns the student."""
    student = recipe.build()
    prove_head(student)
    for leaf in leaves:
        leaf.build(student, share=share)
    for scored in networks_of(student, leaves) if packed else ():
        pack_rows(scored)
    return student


@dataclass(frozen=True)
class Plan:
    """What the first process tells the others of a network.

    Attributes:
        parameters: name, size, type and whether it is trained.
        packs: whether it was proven to pack rows.
    """

    parameters: tuple[tuple[str, tuple[int, ...], torch.dtype, bool], ...]
    packs: bool

    @classmethod
    def of(cls, network: nn.Module) -> Plan:
        found = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in network.named_parameters())
        return cls(found, _decoder(network).config._attn_implementation == PACKED)


class ReadOnce:
    """Networks whose weights the first process alone reads. The others build them without memory for weights (on PyTorch's
    meta device) and never hold a whole copy: once all networks are sharded, `fill` hands every process its shares.

    Buffers are the first process's own, to the bit: a rotary table that was computed again could round otherwise. All ranks
    make one of these, call `build`, shard the networks and call `fill`.
    """

    def __init__(self, recipe: Student, leaves: Sequence[Teacher], packed: bool) -> None:
        self.recipe, self.leaves, self.packed = recipe, leaves, packed
        self._networks: list[nn.Module] = []
        self._whole: list[dict[str, Tensor]] | None = None  # in the first process, until `fill`

    def build(self) -> nn.Module:
        """The student; the teachers keep their own networks.

        Raises:
            RuntimeError: in the other processes, where the first one fails.
        """
        student: nn.Module | None = None
        error: Exception | None = None
        plans: list[Plan] = []
        notes: list[str] = []
        if parallel.rank() == 0:
            try:
                student = build_all(self.recipe, self.leaves, self.packed, share=False)
                plans = [Plan.of(network) for network in networks_of(student, self.leaves)]
            except Exception as raised:  # the others wait for an answer
                error = raised
        plans, problem = parallel.gather_objects((plans, error is not None and f"{type(error).__name__}: {error}"))[0]
        if error is not None:
            raise error
        if problem:
            raise RuntimeError(f"the first process could not build the models: {problem}")
        if student is None:
            student, notes = self._build_hollow(plans)
        self._networks = networks_of(student, self.leaves)
        for note in dict.fromkeys(note for some in parallel.gather_objects(notes) for note in some):
            rank_zero_info(note)
        if parallel.rank() == 0:
            self._whole = [{n: t.detach() for n, t in _tensors(network).items()} for network in self._networks]
        return student

    def fill(self, device: torch.device) -> None:
        """Give sharded networks their weights. All ranks must call it."""
        for i, network in enumerate(self._networks):
            parallel.receive(network, self._whole[i] if self._whole is not None else None, device)
        self._networks, self._whole = [], None

    def _build_hollow(self, plans: Sequence[Plan]) -> tuple[nn.Module, list[str]]:
        """The student, and a line for every network that had to be built whole."""
        notes = []
        student, reason = _hollow(self.recipe.build, plans[0])
        if student is None or reason:
            notes.append(f"every process reads all weights of {self.recipe!r}: {reason}")
            student = self.recipe.build()
        for i, leaf in enumerate(self.leaves):
            before = dict(vars(leaf))
            place = len(networks_of(student, self.leaves[:i]))
            _, reason = _hollow(partial(_built, leaf, student), plans[place] if place < len(plans) else None)
            if reason:
                notes.append(f"every process reads all weights of {leaf!r}: {reason}")
                vars(leaf).clear()
                vars(leaf).update(before)
                leaf.build(student, share=False)
        for network, plan in zip(networks_of(student, self.leaves), plans, strict=True):
            if plan.packs:
                become_packed(network)
        return student, notes


def _built(leaf: Teacher, student: nn.Module) -> nn.Module | None:
    leaf.build(student, share=False)
    return leaf.own_model()


def _hollow(build: Callable[[], nn.Module | None], plan: Plan | None) -> tuple[nn.Module | None, str]:
    """What ``build`` makes without memory for weights, and why that will not do (empty if it will)."""
    try:
        with hollow():
            network = build()
    except Exception as error:  # whatever needs the numbers; it is told, and the network built with them
        return None, f"without weights, building it ends with {type(error).__name__}: {error}"
    if network is None:
        return None, ""
    if plan is None or Plan.of(network).parameters != plan.parameters:
        return network, "without weights, it has other parameters"
    if loose := [k for m in network.modules() for k, v in vars(m).items() if isinstance(v, Tensor) and v.is_meta]:
        return network, f"it keeps {loose[0]}, which is neither a parameter nor a buffer"
    return network, ""


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _decoder(network: nn.Module) -> Any:
    return base_of(network).get_decoder()  # type: ignore[operator]
