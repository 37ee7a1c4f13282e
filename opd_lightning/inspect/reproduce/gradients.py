"""Arms that train nothing: exact gradients, their bias and their noise, in worlds that can be enumerated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.inspect.oracle import TabularWorld, reverse_kl
from opd_lightning.inspect.reproduce.arms import Arm, Curve, Networks, Record, Tick
from opd_lightning.inspect.reproduce.listed import ListedTokens, equation_5
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    Constant,
    CounterfactualRoute,
    FullVocab,
    Immediate,
    NoBaseline,
    Objective,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    Support,
    TopK,
    TopKBaseline,
)
from opd_lightning.objectives.baselines import Baseline
from opd_lightning.types import Completion, Prompt, Rollout, TableLaws


def sampled(baseline: Baseline = NoBaseline(), **axes: object) -> Objective:
    """The policy gradient on drawn tokens, summed."""
    return Objective(ReverseKL(), SampledToken(), baseline=baseline, reduction=Constant(1.0), **axes)  # type: ignore[arg-type]


class SupportIdentity(Arm):
    """What the released code of "Rethinking OPD" descends beside its equation 5, in float64.

    With S the student's top-k, P_S the student's mass there and r the mean log-ratio under the weights::

        gradient of the code = gradient of equation 5 + r grad log P_S

    Args:
        vocab: entries of the two random laws.
        laws: how many pairs.
    """

    def __init__(self, vocab: int = 50, laws: int = 20) -> None:
        self.vocab, self.laws = vocab, laws

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = 2.0 * torch.randn(2, self.laws, self.vocab, generator=generator, dtype=torch.float64)
        full = self._gradient(FullVocab(), student, teacher)
        error = 0.0
        cosines: dict[str, Curve] = {"code": [], "equation_5": []}
        figures = {}
        for k in range(1, self.vocab + 1):
            code, eq5 = (self._gradient(s, student, teacher) for s in (ListedTokens(k), equation_5(k)))
            error = max(error, float((code - eq5 - self._difference(k, student, teacher)).abs().max()))
            for name, found in (("code", code), ("equation_5", eq5)):
                similar = torch.nn.functional.cosine_similarity(found, full, dim=-1).mean()
                cosines[name].append((k, float(similar)))
            if k == 1:
                figures = {"equation_5_at_1": float(eq5.abs().max()), "code_at_1": float(code.norm(dim=-1).min())}
            tick(k / self.vocab)
        at = {f"{name}_cosine_at_{k}": curve[k - 1][1] for name, curve in cosines.items() for k in (2, 4, 16)}
        return Record(figures | {"error": error} | at, {f"cosine_{name}": curve for name, curve in cosines.items()})

    def _gradient(self, support: Support, student: Tensor, teacher: Tensor) -> Tensor:
        """(laws, V) gradient in the student's logits."""
        logits = student.clone().requires_grad_(True)
        rows = [Completion((0,), (torch.nan,), True, 0)] * self.laws
        rollout = Rollout.of([Prompt(i, "", (0,), row=i) for i in range(self.laws)], rows, pad_id=0)
        objective = Objective(ReverseKL(), support, reduction=Constant(1.0), allow_degenerate=True)
        loss = objective(TableLaws(logits), TableLaws(teacher), replace(rollout, scale=(1.0,))).loss
        (found,) = torch.autograd.grad(loss, logits)
        return found

    def _difference(self, k: int, student: Tensor, teacher: Tensor) -> Tensor:
        """``r grad log P_S`` by hand: the gradient of a log-mass is the law inside S minus the law."""
        p, log_ratio = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
        inside = torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)
        within = p * inside / (p * inside).sum(-1, keepdim=True)
        return (within * log_ratio).sum(-1, keepdim=True) * (within - p)


class BaselineBias(Arm):
    """Distance of every baseline's expected gradient from that of the full divergence, all completions enumerated.

    Args:
        vocab: tokens of the world.
        horizon: longest completion.
    """

    def __init__(self, vocab: int = 6, horizon: int = 3) -> None:
        self.vocab, self.horizon = vocab, horizon

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        world = TabularWorld.random(self.vocab, self.horizon, seed, eos=self.vocab - 1)
        exact = world.gradient(reverse_kl, gamma=0.0)
        found: dict[str, float] = {}
        for name, baseline in (("none", NoBaseline()), ("closed_form", ClosedFormBaseline()), ("top_3", TopKBaseline(3))):
            moments = world.moments_of(sampled(baseline))
            found |= {f"{name}_error": float((moments.mean - exact).abs().max()), f"{name}_variance": moments.trace}
            tick(0.5)
        wrong = Objective(ReverseKL(), TopK(3), reduction=Constant(1.0))
        found["top_3_objective_error"] = float((world.moments_of(wrong).mean - exact).abs().max())
        return Record(found)


class BaselineNoise(Arm):
    """Variance of the policy gradient with a closed-form baseline over that without, by the distance of the two laws.

    Exact, over all tokens of some random states; the teacher is the student with its logits disturbed.

    Args:
        vocab: entries.
        laws: states.
    """

    SCALES = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)

    def __init__(self, vocab: int = 64, laws: int = 16) -> None:
        self.vocab, self.laws = vocab, laws

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        generator = torch.Generator().manual_seed(seed)
        student = 1.5 * torch.randn(self.laws, 1, self.vocab, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.laws, 1, self.vocab, generator=generator, dtype=torch.float64)
        curves: dict[str, Curve] = {"closed_form": [], "top_20": []}
        for number, scale in enumerate(self.SCALES, 1):
            traces = dict.fromkeys(("none", "closed_form", "top_20"), 0.0)
            distance = 0.0
            for p, change in zip(student, noise, strict=True):
                world = TabularWorld(p, p + scale * change, horizon=1)
                distance += float(reverse_kl(*world.laws()).detach()) / self.laws
                for name, baseline in (
                    ("none", NoBaseline()),
                    ("closed_form", ClosedFormBaseline()),
                    ("top_20", TopKBaseline(20)),
                ):
                    traces[name] += world.moments_of(sampled(baseline)).trace
            for name, curve in curves.items():
                curve.append((distance, traces[name] / traces["none"]))
            tick(number / len(self.SCALES))
        figures: dict[str, float] = {}
        for name, curve in curves.items():
            near, far = curve[0], min(curve, key=lambda point: abs(point[0] - 1.0))
            figures |= {f"{name}_near": near[1], f"{name}_far": far[1], "kl_near": near[0], "kl_far": far[0]}
        return Record(figures, {f"ratio_{name}": curve for name, curve in curves.items()})


class CreditBias(Arm):
    """Bias and noise of generalised advantage estimation, all completions enumerated, for a critic that is off by noise.

    Args:
        vocab: tokens of the world.
        horizon: longest completion.
        coupled: False gives every state behind the first the same laws, so that no token changes what follows.
    """

    def __init__(self, vocab: int = 4, horizon: int = 4, coupled: bool = True) -> None:
        self.vocab, self.horizon, self.coupled = vocab, horizon, coupled

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        world = TabularWorld.random(self.vocab, self.horizon, seed)
        if not self.coupled:
            first = [next(i for i, s in enumerate(world.states) if len(s) == len(state)) for state in world.states]
            world = TabularWorld(world.student.detach()[first], world.teacher[first], self.horizon)
        to_go = world.moments_of(sampled(credit=ReturnToGo()))
        local = world.moments_of(sampled(credit=Immediate()))
        # what the critic of GAE predicts is minus the cost behind the state, its own divergence left out
        exact = -(world.value(reverse_kl) - reverse_kl(*world.laws())).detach()
        noise = torch.randn(len(world.states), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        size = float(to_go.mean.norm())
        bias: Curve = []
        figures = {"coupling": float((to_go.mean - local.mean).norm()) / float(local.mean.norm())}
        for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
            moments = world.moments_of(sampled(credit=GAE(1.0, lam)), critic=exact + 0.5 * noise)
            bias.append((lam, float((moments.mean - to_go.mean).norm()) / size))
            figures[f"bias_at_{int(100 * lam)}"] = bias[-1][1]
        doubled = world.moments_of(sampled(credit=GAE(1.0, 0.0)), critic=exact + noise)
        with_exact = world.moments_of(sampled(credit=GAE(1.0, 1.0)), critic=exact)
        figures |= {
            "bias_doubled_error": float((doubled.mean - to_go.mean).norm()) / size,
            "bias_exact_critic": float(
                (world.moments_of(sampled(credit=GAE(1.0, 0.0)), critic=exact).mean - to_go.mean).norm()
            ),
            "variance_ratio": with_exact.trace / to_go.trace,
            "variance_over_local": with_exact.trace / local.trace,
        }
        return Record(figures, {"bias": bias})


class RouteBias(Arm):
    """Bias and noise of counterfactual routes, all completions enumerated, and where mass goes when a token is suppressed.

    Args:
        vocab: tokens of the world.
        horizon: longest completion.
    """

    def __init__(self, vocab: int = 5, horizon: int = 3) -> None:
        self.vocab, self.horizon = vocab, horizon

    def run(self, seed: int, networks: Networks, tick: Tick, keep: Path | None = None) -> Record:
        world = TabularWorld.random(self.vocab, self.horizon, seed, scale=1.5)
        exact = world.gradient(reverse_kl, gamma=0.0)
        curves: dict[str, Curve] = {"balanced_variance": [], "plain_cosine": []}
        figures = {"none_variance": world.moments_of(sampled()).trace}
        worst = 0.0
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
            routes = (CounterfactualRoute("canonical", strength, balanced) for balanced in (True, False))
            balanced, plain = (world.moments_of(sampled(ClosedFormBaseline(), route=route)) for route in routes)
            worst = max(worst, float((balanced.mean - exact).abs().max()))
            curves["balanced_variance"].append((strength, balanced.trace / figures["none_variance"]))
            cosine = torch.nn.functional.cosine_similarity(plain.mean.flatten(), exact.flatten(), dim=0)
            curves["plain_cosine"].append((strength, float(cosine)))
        figures |= {"balanced_error": worst, "balanced_best_variance": min(v for _, v in curves["balanced_variance"])}
        figures |= {"unrouted_variance": curves["balanced_variance"][0][1], "plain_cosine": curves["plain_cosine"][-1][1]}
        return Record(figures | self._golden(), curves)

    def _golden(self) -> dict[str, float]:
        """One suppressed token: how far the divergence falls, and what share of the gain goes where the teacher is."""
        student = torch.tensor([[0.70, 0.25, 0.04, 0.01]], dtype=torch.float64).log()
        teacher = torch.tensor([[0.05, 0.05, 0.85, 0.05]], dtype=torch.float64).log()
        world = TabularWorld(student, teacher, horizon=1)
        (suppressed,) = (i for i, path in enumerate(world.paths) if path.tokens == (0,))
        found = {"golden_kl": float(reverse_kl(*world.laws()).detach())}
        geometric = CounterfactualRoute("geometric", 1.0, alpha=0.5)
        for name, objective in (("vanilla", sampled()), ("routed", sampled(route=geometric, allow_degenerate=True))):
            step = student - world.gradients_of(objective)[suppressed]
            gain = (step.softmax(-1) - student.exp())[0].clamp(min=0.0)
            found[f"golden_{name}_kl"] = float(reverse_kl(step.log_softmax(-1), teacher))
            found[f"golden_{name}_share"] = float(gain[2] / gain.sum())
        return found
