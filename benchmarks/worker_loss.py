"""The reverse KL from hidden states and heads, forward and backward: ours, whole logits, TRL's chunked kernel, Liger's loss.

Runs in our environment or in a peer's; only the variants that are asked for are imported. Every variant gives the mean over
tokens of KL(student ‖ teacher), with the gradient of the student's hidden states and, unless it is frozen, of its head.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.memory import keep_freed  # needs nothing but the standard library
from protocol import answer, orders, rss, versions


@dataclass(frozen=True)
class Inputs:
    """Random hidden states and heads of both models.

    Attributes:
        student: (N, D) with gradient.
        teacher: (N, D).
        student_head: D to V, no bias; with gradient unless frozen.
        teacher_head: D to V, no bias.
    """

    student: Tensor
    teacher: Tensor
    student_head: nn.Linear
    teacher_head: nn.Linear

    @classmethod
    def random(cls, tokens: int, vocab: int, width: int, dtype: str, frozen: bool, device: str = "cpu") -> Inputs:
        """The same numbers in every process."""
        generator = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, kind)

        heads = []
        for trained in (not frozen, False):
            head = nn.Linear(width, vocab, bias=False, dtype=kind, device="meta")
            head.weight = nn.Parameter(normal(vocab, width, scale=0.05), requires_grad=trained)
            heads.append(head)
        return cls(normal(tokens, width).requires_grad_(), normal(tokens, width), *heads)

    def forget(self) -> None:
        """Drop the gradients."""
        self.student.grad = self.student_head.weight.grad = None


Loss = Callable[[Inputs], Tensor]


def naive(given: Inputs) -> Tensor:
    """Whole logits of both models, log-softmax in float32."""
    with torch.no_grad():
        theirs = given.teacher_head(given.teacher).float().log_softmax(-1)
    ours = given.student_head(given.student).float().log_softmax(-1)
    divergence: Tensor = (ours.exp() * (ours - theirs)).sum(-1)
    return divergence.mean()


def ours() -> Loss:
    """Our objective, as a training step calls it."""
    from opd_lightning.models.distributions import DenseLaws
    from opd_lightning.objectives import Objective, ReverseKL
    from opd_lightning.ops.heads import Head
    from opd_lightning.types import Completion, Prompt, Rollout

    objective = Objective(ReverseKL())
    made: dict[tuple[int, int], Rollout] = {}

    def rollout(tokens: int, vocab: int) -> Rollout:
        draw = torch.Generator().manual_seed(1)
        rows = 8 if tokens % 8 == 0 else 1
        ids = torch.randint(vocab, (rows, tokens // rows), generator=draw).tolist()
        written = [Completion(tuple(row), (-1.0,) * len(row), ended=False, policy_step=0) for row in ids]
        return Rollout.of([Prompt(i, "", (0,)) for i in range(rows)], written, 0)

    def loss(given: Inputs) -> Tensor:
        size = len(given.student), given.student_head.out_features
        made.setdefault(size, rollout(*size))
        student = DenseLaws(given.student, Head(given.student_head, size[1]), size[1])
        teacher = DenseLaws(given.teacher, Head(given.teacher_head, size[1]), size[1])
        return objective(student, teacher, made[size].to(given.student.device)).loss

    return loss


def trl() -> Loss:
    """TRL's chunked kernel; its beta = 1 is the reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(given: Inputs) -> Tensor:
        student, teacher = given.student_head.weight, given.teacher_head.weight
        found, _ = ChunkedDivergenceFunction.apply(
            given.student, student, None, given.teacher, teacher, None, 1.0, 1.0, 1.0, None, 1.0, None
        )
        return found.sum() / len(given.student)  # type: ignore[no-any-return]

    return loss


def liger() -> Loss:
    """Liger's fused linear JSD at the divergence that TRL uses it for; no compilation, which is slower on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, chunk_size=1024)

    def loss(given: Inputs) -> Tensor:
        labels = torch.zeros(len(given.student), dtype=torch.long, device=given.student.device)
        weights = given.student_head.weight, given.teacher_head.weight
        return fused(given.student, weights[0], given.teacher, weights[1], labels)  # type: ignore[no-any-return]

    return loss


VARIANTS: dict[str, Callable[[], Loss]] = {"naive": lambda: naive, "ours": ours, "trl": trl, "liger": liger}


def run(loss: Loss, given: Inputs) -> float:
    """One forward and backward; the loss."""
    given.forget()
    value = loss(given)
    value.backward()
    return float(value.detach())


def errors(loss: Loss, **size: Any) -> dict[str, float]:
    """Relative error of loss and gradients against whole float32 logits, on float32 inputs."""
    given = Inputs.random(**{**size, "dtype": "float32"})
    found = run(loss, given), _gradient(given)
    expected = run(naive, given), _gradient(given)
    gradient = float((found[1] - expected[1]).norm() / expected[1].norm())
    return {"loss_error": abs(found[0] - expected[0]) / abs(expected[0]), "gradient_error": gradient}


def _gradient(given: Inputs) -> Tensor:
    parts = [g for g in (given.student.grad, given.student_head.weight.grad) if g is not None]
    return torch.cat([g.reshape(-1).double() for g in parts])


def growth(loss: Loss, given: Inputs) -> int:
    """Bytes by which the second forward and backward raises this process above where it stood before the first one.

    So buffers that are kept count, and what a compiler needs once does not.
    """
    base = _settled()
    run(loss, given)
    given.forget()
    _settled()
    if given.student.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, given)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(loss, given)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return peak - base


def _settled() -> int:
    """Resident bytes after what is free was given back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    return rss()


def main() -> None:
    """Obey until the pipe is closed. All variants keep what they free, as every `opd fit` on a CPU does."""
    keep_freed()
    losses = {name: VARIANTS[name]() for name in sys.argv[1:]}
    answer(versions=versions("torch", "trl", "liger-kernel"))
    size: dict[str, Any] = {}
    given = Inputs.random(8, 16, 4, "float32", frozen=False)
    for order in orders():
        loss = losses[order["variant"]]
        if order["do"] == "check":
            answer(**errors(loss, **order["size"]))
            continue
        if order["size"] != size:
            del given
            size, given = order["size"], Inputs.random(**order["size"])
        if order["do"] == "memory":
            run(loss, Inputs.random(64, 1024, 64, "bfloat16", order["size"]["frozen"], order["size"].get("device", "cpu")))
            answer(bytes=growth(loss, given))
            continue
        started = time.perf_counter()
        value = run(loss, given)
        if given.student.is_cuda:
            torch.cuda.synchronize()
        answer(seconds=time.perf_counter() - started, loss=value)


if __name__ == "__main__":
    main()
