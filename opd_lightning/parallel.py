"""Every line of the package that knows about processes or sharding."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(item: T) -> list[T]:
    """``item`` of every rank, on every rank. All ranks must call it."""
    if world_size() == 1:
        return [item]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, item)
    return out


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sum plain numbers over ranks, in float64. All ranks must call it with equally many."""
    if world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: student and teacher sharded over all processes, in one data-parallel dimension.

    The stock default of ModelParallelStrategy is data parallelism over nodes and tensor parallelism inside them.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


if "fsdp2" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")


def refuse_absent(strategy: Any) -> None:
    """Refuse a strategy, by its name, whose package is not installed.

    Raises:
        ImportError: naming the package and what does without it.
    """
    if str(strategy).startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"trainer.strategy={strategy} needs the package deepspeed, which is not installed: `pip install deepspeed` (NVIDIA "
            "GPUs only), or shard without it: `--trainer.strategy fsdp2`"
        )


def refuse_split_weights(strategy: Any) -> None:
    """Refuse a strategy under which no process ever holds the whole weights that a rollout reads.

    Raises:
        ValueError: naming the strategy to take.
    """
    if isinstance(strategy, FSDPStrategy):
        # Each forward pass shards a layer again, inside summon_full_params too: ranks with unequal completions hang.
        raise ValueError("trainer.strategy fsdp (FSDP1) cannot write rollouts here: use `--trainer.strategy fsdp2`")
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ValueError(
            "trainer.strategy deepspeed_stage_3 keeps a share of each weight on every device, and rollouts read whole ones: "
            "use `--trainer.strategy deepspeed_stage_2`, or fsdp2 to shard the weights too"
        )


def is_sharded(strategy: Any) -> bool:
    """Whether a strategy cuts parameters into pieces."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def shard(base: nn.Module, mesh: Any) -> None:
    """FSDP2: every decoder layer, then the Hugging Face model itself as the root.

    The root is the model, not the LightningModule, so that generation and scoring from any hook pass its hooks.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers: Any = base.get_decoder().layers  # type: ignore[operator]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)
    base.run_inside = lambda fn: fn()  # type: ignore[assignment]
    register_fsdp_forward_method(base, "run_inside")


def run_inside(base: nn.Module, fn: Callable[[], T]) -> T:
    """Run ``fn`` as the forward pass of a model: under FSDP2 the root's weights (embeddings, norm, head) are whole."""
    inside = getattr(base, "run_inside", None)
    result: T = inside(fn) if inside is not None else fn()  # type: ignore[operator]
    return result


@contextmanager
def whole_weights(*models: nn.Module | None) -> Iterator[None]:
    """Weights complete and local: nothing inside communicates, so ranks may write completions of different lengths."""
    from torch.distributed.fsdp import FSDPModule

    units = [u for m in models if m is not None for u in m.modules() if isinstance(u, FSDPModule)]
    roots = {id(u) for m in models if m is not None for u in _roots(m)}
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(id(unit) not in roots, recurse=False)
            unit.reshard()


def is_cut(model: nn.Module) -> bool:
    """Whether each process keeps a share of the weights alone."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def _roots(model: nn.Module) -> list[nn.Module]:
    """The outermost FSDP2 units."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        return [model]
    return [root for child in model.children() for root in _roots(child)]


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the name that they have under every strategy."""
    clean = ((name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", ""), p) for name, p in module.named_parameters())
    return dict(clean)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole, detached CPU tensors of a model. All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(isinstance(p, dist.tensor.DTensor) for p in model.parameters()):
        whole: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole
    return {k: v.detach().cpu() for k, v in model.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A detached CPU copy, gathered if it is sharded. All ranks must call it."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copied: torch.Tensor = gathered.detach().to("cpu", copy=True)
    return copied


@torch.no_grad()
def put_whole(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Inverse of `whole`, in place: a sharded tensor takes its own part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, so that what is changed next are the parts that FSDP2 keeps."""
    from torch.distributed.fsdp import FSDPModule

    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def optimizer_states_by_name(module: Any, checkpoint: dict[str, Any]) -> None:
    """Key optimizer states by parameter name, so that a checkpoint moves between strategies."""
    names = list(parameter_names(module))
    renamed = []
    for state in checkpoint.get("optimizer_states", []):
        if not state or any(isinstance(i, str) for g in state["param_groups"] for i in g["params"]):
            renamed.append(state)  # empty on ranks > 0, or by name already (distributed folder)
            continue
        groups = [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]]
        renamed.append({"state": {names[i]: s for i, s in state["state"].items()}, "param_groups": groups})
    checkpoint["optimizer_states"] = renamed


def optimizer_states_by_position(module: Any, checkpoint: dict[str, Any]) -> None:
    """The reverse for plain strategies, which restore by position; sharded ones read names themselves."""
    if is_sharded(module.trainer.strategy):
        return
    index = {name: i for i, name in enumerate(parameter_names(module))}
    checkpoint["optimizer_states"] = [
        {
            "state": {index[n]: s for n, s in state["state"].items()},
            "param_groups": [{**g, "params": [index[n] for n in g["params"]]} for g in state["param_groups"]],
        }
        for state in checkpoint.get("optimizer_states", [])
    ]


def shared_counter(name: str) -> Callable[[int], int]:
    """A number that all ranks share: adds to it and returns the sum, without waiting for other ranks. For threads: it has a
    connection of its own, which works while the main thread sits in a collective.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone() if hasattr(store, "clone") else store  # older torch shares one

    def add(amount: int) -> int:
        total: int = store.add(name, amount)
        return total

    return add
