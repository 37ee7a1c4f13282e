"""Every line of the package that knows about processes or sharding."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision
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


class _WholePrecision(FSDPPrecision):
    """Lightning's own converts no frozen records and clips no gradient by its norm, which only the root knows."""

    root: Any

    def convert_input(self, data: Any) -> Any:
        return data

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        self.root.clip_grad_norm_(clip_val)


class FSDP1Strategy(FSDPStrategy):
    """FSDP1: the student sharded over all processes, a unit a decoder layer; teachers stay whole. FSDP2 is the first choice.

    Lightning's own refuses CPUs, and on a CPU its whole checkpoints are views of memory that FSDP frees.
    """

    base: nn.Module
    """The Hugging Face model of the student; `split` sets it."""

    def setup_environment(self) -> None:
        self.precision_plugin = _WholePrecision("32-true")
        super().setup_environment()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        root: nn.Module | None = _fsdp1_root(self.base)
        if root is not None:  # of an earlier fit or validate
            return root
        layers: Any = self.base.get_decoder().layers  # type: ignore[operator]
        units = set(layers)
        policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: m in units)
        keys = {"auto_wrap_policy": policy, "device_id": self.root_device, **self.kwargs}
        root = FullyShardedDataParallel(model, cpu_offload=self.cpu_offload, sharding_strategy=self.sharding_strategy, **keys)
        self.base.__dict__["_fsdp1_root"] = root  # not a submodule: it lies above
        self.precision_plugin.root = root  # type: ignore[attr-defined]
        return root

    def _one_piece(self) -> Any:
        from torch.distributed.fsdp import (
            FullOptimStateDictConfig,
            FullStateDictConfig,
            FullyShardedDataParallel,
            StateDictType,
        )

        offload = self.root_device.type != "cpu"  # a move from CPU to CPU copies nothing, and what it leaves is freed
        weights = FullStateDictConfig(offload_to_cpu=offload, rank0_only=True)
        states = FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=True)
        assert self.model is not None
        return FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, weights, states)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type != "full":
            return super().lightning_module_state_dict()
        assert self.model is not None
        with self._one_piece():
            whole: dict[str, Any] = self.model.state_dict()
        return whole

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if self._state_dict_type != "full":
            return super().optimizer_state(optimizer)
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._one_piece():
            return FullyShardedDataParallel.optim_state_dict(self.model, plain)  # keyed by name


def own_strategy(strategy: Any, precision: Any = None) -> Any:
    """Our FSDP1 for the flag ``fsdp``; anything else as it is.

    Raises:
        ValueError: for a precision that FSDP1 gets wrong.
    """
    chosen = FSDP1Strategy() if strategy == "fsdp" else strategy
    if isinstance(chosen, FSDP1Strategy) and precision not in (None, 32, "32", "32-true"):
        raise ValueError(
            f"trainer.strategy fsdp (FSDP1) with trainer.precision={precision} rounds rotary tables: load the weights in "
            "bfloat16 (`--model.student.dtype bfloat16`), or take `--trainer.strategy fsdp2`"
        )
    return chosen


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
    if isinstance(strategy, FSDPStrategy) and not isinstance(strategy, FSDP1Strategy):
        # Its layers are sharded again behind each forward pass: ranks with unequal completions hang.
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} is Lightning's FSDP1, under which no rank can write rollouts by "
            "itself: use `--trainer.strategy fsdp2`, or `fsdp` for FSDP1"
        )
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


def split(module: Any, base: nn.Module, teachers: list[nn.Module]) -> None:
    """Share the networks among processes, as the module's strategy wants it. FSDP1 wraps later, and the student alone."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP1Strategy):
        strategy.base = base
    if module.device_mesh is not None:  # only the FSDP2 strategy sets it
        for network in (base, *teachers):
            shard(network, module.device_mesh["data_parallel"])


def run_inside(base: nn.Module, fn: Callable[[], T]) -> T:
    """Run ``fn`` as the forward pass of a model: under FSDP2 the root's weights (embeddings, norm, head) are whole.

    Under FSDP1 a training step is inside already; anywhere else, where nothing is learnt, all weights are gathered.
    """
    from torch.distributed.fsdp._common_utils import TrainingState

    if (root := _fsdp1_root(base)) is not None and root.training_state is TrainingState.IDLE:
        with whole_weights(base):
            return fn()
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

    if model is None or (root := _fsdp1_root(model)) is None:
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


def _fsdp1_root(model: nn.Module) -> Any:
    """The FSDP1 wrapper above a student; None under every other strategy."""
    return next((root for m in model.modules() if (root := m.__dict__.get("_fsdp1_root")) is not None), None)


def is_cut(model: nn.Module) -> bool:
    """Whether each process keeps a share of the weights alone."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())


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
