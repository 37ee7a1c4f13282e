"""The rollouts in use, and the loader that hands them out.

Lightning's epoch is the whole run. The loader pulls: before the first micro-batch of a refresh it asks for new rollouts, so
correctness never depends on epoch hooks. Every rank hands out equally many micro-batches, whatever the completions' lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from opd_lightning.seeds import fold
from opd_lightning.types import Rollout


@dataclass(frozen=True)
class Plan:
    """How the rollouts of a refresh are cut up. One process or eight cut the same optimizer steps out of the same rows.

    Attributes:
        batch_size: rollouts of an optimizer step, over all ranks.
        micro_batch_size: rollouts of one forward pass on one rank.
        steps: optimizer steps that use one refresh, all passes counted.
        passes: how often every rollout is used.
        rank, world: this process among all.
        together: neighbouring rows that stay in one micro-batch.
    """

    batch_size: int
    micro_batch_size: int
    steps: int
    passes: int
    rank: int
    world: int
    together: int = 1

    @property
    def accumulate(self) -> int:
        """Micro-batches of an optimizer step on one rank."""
        return self.batch_size // (self.micro_batch_size * self.world)

    @property
    def chunks(self) -> int:
        """Distinct optimizer-step batches in a refresh."""
        return self.steps // self.passes

    @property
    def rows(self) -> int:
        """Rollouts of a refresh, over all ranks."""
        return self.chunks * self.batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches that one rank hands out between two refreshes."""
        return self.steps * self.accumulate

    def local_rows(self, refresh: int) -> list[int]:
        """Numbers of this rank's rollouts: an equal, contiguous share of every optimizer step."""
        share = self.batch_size // self.world
        first = refresh * self.rows + self.rank * share
        return [first + chunk * self.batch_size + i for chunk in range(self.chunks) for i in range(share)]


class RolloutBuffer:
    """This rank's rollouts of one refresh.

    Attributes:
        plan: how they are cut up.
        seed: of the order of optimizer steps in later passes.
        position: micro-batches handed out since training began.
        refresh: number of the refresh that the rows belong to; -1 before the first.
        rollout: the rows, step by step, or None.
        scales: the loss factors of every distinct optimizer step (see `Rollout.scale`).
        refill: set by the callback that owns the refresh.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.position, self.refresh = 0, -1
        self.rollout: Rollout | None = None
        self.scales: list[tuple[float, ...]] = []
        self.refill: Callable[[int], None] | None = None

    def put(self, refresh: int, rollout: Rollout, scales: list[tuple[float, ...]]) -> None:
        self.refresh, self.rollout, self.scales = refresh, rollout, scales

    def micro_batch(self, index: int) -> Rollout:
        """Micro-batch ``index`` of the current refresh. Rows of a step (or what stays together) are sorted by length, so that
        short ones are not padded to long ones; the sum over the step does not depend on it.
        """
        assert self.rollout is not None
        plan, share = self.plan, self.plan.micro_batch_size * self.plan.accumulate
        step, i = divmod(index, plan.accumulate)
        chunk = self._order(step // plan.chunks)[step % plan.chunks]
        rows = torch.arange(chunk * share, (chunk + 1) * share).view(-1, plan.together)
        rows = rows[self.rollout.text.lengths[rows].amax(-1).argsort(stable=True)].flatten()
        chosen = rows[i * plan.micro_batch_size : (i + 1) * plan.micro_batch_size]
        return replace(self.rollout.select(chosen), scale=self.scales[chunk])

    def _order(self, pass_number: int) -> list[int]:
        if pass_number == 0:
            return list(range(self.plan.chunks))
        generator = torch.Generator().manual_seed(fold(self.seed, "order", self.refresh, pass_number))
        order: list[int] = torch.randperm(self.plan.chunks, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[Rollout]:
        while True:
            refresh, index = divmod(self.position, self.plan.micro_batches)
            if self.refresh != refresh:
                if self.refill is None:
                    raise RuntimeError("the rollout buffer is empty: is RolloutRefresh among the callbacks?")
                self.refill(refresh)
            micro_batch = self.micro_batch(index)
            self.position += 1  # before the yield: a checkpoint taken while the batch is in use counts it
            yield micro_batch


class RolloutLoader:
    """What ``train_dataloader`` returns: sized, so Lightning does not prefetch; stateful in name only, because the position
    lives in the callback's state, which Lightning restores from every kind of checkpoint.
    """

    def __init__(self, buffer: RolloutBuffer, length: int) -> None:
        self.buffer, self.length = buffer, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.buffer)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.buffer.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see the class."""
