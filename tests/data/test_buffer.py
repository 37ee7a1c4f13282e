from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.data.buffer import Plan, RolloutBuffer
from opd_lightning.types import Completion, Prompt, Rollout


def filled(plan: Plan, refresh: int) -> RolloutBuffer:
    buffer = RolloutBuffer(plan, seed=1)

    def refill(number: int) -> None:
        rows = plan.local_rows(number)
        prompts = [Prompt(index=row, text="", ids=(1,), row=row) for row in rows]
        written = [Completion((5,) * (1 + row * 7 % 5), (-1.0,) * (1 + row * 7 % 5), True, number) for row in rows]
        buffer.put(number, Rollout.of(prompts, written, 0), [(float(c + 1),) for c in range(plan.chunks)])

    buffer.refill = refill
    return buffer


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
    chunks=st.integers(1, 3),
    passes=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_cut_makes_the_same_optimizer_steps(world: int, micro: int, chunks: int, passes: int) -> None:
    """The rows of an optimizer step do not depend on ranks and micro-batches; every row is used ``passes`` times."""
    steps: dict[int, set[int]] = {}
    used: list[int] = []
    for rank in range(world):
        plan = Plan(16, micro, chunks * passes, passes, rank, world)
        buffer = filled(plan, 0)
        batches = iter(buffer)
        for refresh in range(2):
            for step in range(plan.steps):
                for _ in range(plan.accumulate):
                    batch = next(batches)
                    assert len(batch) == micro
                    steps.setdefault(refresh * plan.steps + step, set()).update(batch.row.tolist())
                    used += batch.row.tolist()
    reference = filled(Plan(16, 16, chunks * passes, passes, 0, 1), 0)
    alone = iter(reference)
    for number in range(2 * chunks * passes):
        batch = next(alone)
        assert steps[number] == set(batch.row.tolist())
    assert sorted(used) == sorted(list(range(2 * chunks * 16)) * passes)


def test_the_loader_pulls_and_counts() -> None:
    plan = Plan(batch_size=4, micro_batch_size=2, steps=2, passes=1, rank=0, world=1)
    buffer = filled(plan, 0)
    batches = iter(buffer)
    assert buffer.refresh == -1  # nothing is written before it is asked for
    seen = []
    for _ in range(6):
        next(batches)
        seen.append((buffer.refresh, buffer.position))
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6)]


def test_micro_batches_carry_their_steps_scale_and_are_cut_to_length() -> None:
    plan = Plan(batch_size=4, micro_batch_size=2, steps=2, passes=1, rank=0, world=1)
    batches = iter(filled(plan, 0))
    first, second, third = (next(batches) for _ in range(3))
    assert (first.scale, second.scale, third.scale) == ((1.0,), (1.0,), (2.0,))
    for batch in (first, second):
        assert batch.text.ids.shape[1] == int(batch.text.lengths.max())
    assert int(first.text.lengths.max()) <= int(second.text.lengths.min())  # short rows together
    assert torch.equal(first.text.lengths, first.text.lengths.sort().values)
