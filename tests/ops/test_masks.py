import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.ops import masks


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_mask_selects_exactly_the_completion_targets(lengths: list[tuple[int, int]]) -> None:
    width = max(2, max(p + c for p, c in lengths))
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, (p, c) in enumerate(lengths):
        ids[row, p : p + c] = torch.arange(1, c + 1)  # completion tokens are numbered from 1
    prompts, completions = (torch.tensor(column) for column in zip(*lengths, strict=True))
    mask = masks.completion_mask(prompts, completions, width)
    for row, (_, c) in enumerate(lengths):
        assert masks.targets(ids)[row][mask[row]].tolist() == list(range(1, c + 1))


def test_flatten_takes_the_state_before_the_token() -> None:
    states = torch.arange(8.0).reshape(1, 4, 2)
    mask = torch.tensor([[False, True, True]])
    assert masks.flatten_completions(states, mask).tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_unflatten_is_the_inverse_and_differentiable() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = masks.unflatten_completions(flat, mask)
    assert grid[mask].tolist() == flat.tolist()
    (grid * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert flat.grad.tolist() == [0.0, 2.0, 4.0]


def test_masked_values_never_count_not_even_nan() -> None:
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert masks.masked_sum(values, mask).item() == 4.0
    assert masks.masked_mean(values, torch.zeros_like(mask)).item() == 0.0
