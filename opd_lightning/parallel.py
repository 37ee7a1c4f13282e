"""Every line that knows about processes or sharding, except for the strategies themselves (`opd_lightning.strategies`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

T = TypeVar("T")
FSDP1_ROOT = "_fsdp1_root"
"""Where a student keeps the FSDP1 wrapper above it; not as a submodule."""


def in_group() -> bool:
    """Whether this process belongs to a group of them, be it the only one."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if in_group() else 0


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


@torch.no_grad()
def receive(network: nn.Module, values: dict[str, torch.Tensor] | None, device: torch.device) -> None:
    """FSDP2: the first rank's parameters and buffers for all ranks, each taking its own part. All ranks must call it.

    Args:
        network: sharded; its parameters and buffers may be on the meta device.
        values: whole tensors by name on the first rank, None on the others.
        device: where the others hold theirs.
    """
    if any(t.is_meta for t in (*network.parameters(), *network.buffers())):
        network.to_empty(device=device)
    for name, part in network.named_parameters():  # the others' memory is never written to: it only says which size
        put_whole(part, values[name] if values else torch.empty(part.shape, dtype=part.dtype, device=part.device))
    own = dict(network.named_buffers())
    sent = gather_objects({n: values[n].cpu() for n in own} if values else {})[0]
    for name, buffer in own.items():
        buffer.copy_(sent[name])


def run_inside(base: nn.Module, fn: Callable[[], T]) -> T:
    """Run ``fn`` as the forward pass of a model: under FSDP2 the root's weights (embeddings, norm, head) are whole.

    Under FSDP1 a training step is inside already; anywhere else, where nothing is learnt, all weights are gathered.
    """
    from torch.distributed.fsdp._common_utils import TrainingState

    if (root := fsdp1_root(base)) is not None and root.training_state is TrainingState.IDLE:
        with whole_weights(base):
            return fn()
    inside = getattr(base, "run_inside", None)
    result: T = inside(fn) if inside is not None else fn()  # type: ignore[operator]
    return result


@contextmanager
def whole_weights(*models: nn.Module | None) -> Iterator[None]:
    """Weights complete and local: nothing inside communicates, so ranks may write completions of different lengths."""
    if not in_group():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [u for m in models if m is not None for u in m.modules() if isinstance(u, FSDPModule)]
    roots = {id(u) for m in models if m is not None for u in _roots(m)}
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(unwrapped(model))
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(id(unit) not in roots, recurse=False)
                unit.reshard()


@contextmanager
def unwrapped(model: nn.Module | None) -> Iterator[None]:
    """Under FSDP1: gathered weights, and plain layers in place of their wrappers, which would communicate when called.

    All ranks must enter it; inside, each goes its own way. Under any other strategy it is nothing.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if model is None or (root := fsdp1_root(model)) is None:
        yield
        return
    wrappers = [
        (parent, name, m)
        for parent in model.modules()
        for name, m in parent.named_children()
        if isinstance(m, FullyShardedDataParallel)
    ]
    with FullyShardedDataParallel.summon_full_params(root, writeback=False):
        for parent, name, wrapper in wrappers:
            setattr(parent, name, wrapper.module)
        try:
            yield
        finally:
            for parent, name, wrapper in wrappers:
                setattr(parent, name, wrapper)


def fsdp1_root(model: nn.Module) -> Any:
    """The FSDP1 wrapper above a student; None under every other strategy."""
    if not in_group():  # a look at every module takes a millisecond
        return None
    return next((root for m in model.modules() if (root := m.__dict__.get(FSDP1_ROOT)) is not None), None)


def is_cut(model: nn.Module) -> bool:
    """Whether each process keeps a share of the weights alone."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return in_group() and any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model before FSDP2, which makes one of its own of every class that it shards."""
    from torch.distributed.fsdp import FSDPModule

    found: type[nn.Module] = type(model).__bases__[-1] if isinstance(model, FSDPModule) else type(model)
    return found


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
        gathered: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return gathered
    with unwrapped(model):
        return {k: whole(v) for k, v in model.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A detached CPU copy, gathered if it is sharded. All ranks must call it."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copied: torch.Tensor = gathered.detach().to("cpu", copy=True)
    return copied


@torch.no_grad()
def put_whole(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Inverse of `whole`, in place: a sharded tensor takes its own part of what the first rank passes."""
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


def gradient_norm(optimizer: Any, sharded: nn.Module | None = None) -> float:
    """L2 norm of a step's gradient, the same on every rank. All ranks must call it, behind the last backward pass.

    Args:
        optimizer: of all parameters.
        sharded: the module that holds them, under a strategy that shards.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if sharded is None or fsdp1_root(sharded) is None:
        return float(norm)
    return math.sqrt(sum_over_ranks([float(norm) ** 2])[0])  # each rank holds a part of every gradient


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
