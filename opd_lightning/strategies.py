"""The strategies that shard: FSDP2, FSDP1, and what is refused."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from opd_lightning import parallel


def clip(module: Any, optimizer: Optimizer, most: float | None, algorithm: Any) -> None:
    """Scale a step's gradient down to a norm of at most ``most``, as `torch.nn.utils.clip_grad_norm_` does. The norm that
    `TrainMonitor` has measured is not measured again, and a gradient that is short enough is not touched. Lightning clips where
    gradients carry a scaler's factor alone: it refuses fused optimizers in every mixed precision.
    """
    if not most:
        return
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        module.clip_gradients(optimizer, most, algorithm)
    elif algorithm == "value":
        torch.nn.utils.clip_grad_value_(weights, most)
    else:
        sharded = module if parallel.is_sharded(module.trainer.strategy) else None
        norm = parallel.gradient_norm(optimizer, sharded) if module.gradient_norm is None else module.gradient_norm
        if norm > most:
            torch._foreach_mul_([p.grad for p in weights], most / (norm + 1e-6))


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
    """Lightning's own makes weights float32 whatever they were loaded in, and converts no frozen records."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


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

        root: nn.Module | None = parallel.fsdp1_root(self.base)
        if root is not None:  # of an earlier fit or validate
            return root
        if len(kinds := {str(p.dtype).removeprefix("torch.") for p in model.parameters()}) > 1:
            raise ValueError(
                f"trainer.strategy fsdp (FSDP1) cuts weights of one dtype, and this student has {' and '.join(sorted(kinds))} "
                "(adapters are float32): load it with `--model.student.dtype float32`, or take `--trainer.strategy fsdp2`"
            )
        layers: Any = self.base.get_decoder().layers  # type: ignore[operator]
        units = set(layers)
        policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: m in units)
        keys = {"auto_wrap_policy": policy, "device_id": self.root_device, **self.kwargs}
        root = FullyShardedDataParallel(model, cpu_offload=self.cpu_offload, sharding_strategy=self.sharding_strategy, **keys)
        self.base.__dict__[parallel.FSDP1_ROOT] = root
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


def split(module: Any, base: nn.Module, teachers: list[nn.Module]) -> None:
    """Share the networks among processes, as the module's strategy wants it. FSDP1 wraps later, and the student alone."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP1Strategy):
        strategy.base = base
    if module.device_mesh is not None:  # only the FSDP2 strategy sets it
        for network in (base, *teachers):
            parallel.shard(network, module.device_mesh["data_parallel"])
