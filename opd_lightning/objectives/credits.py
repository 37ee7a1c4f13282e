"""Which earlier token answers for a divergence.

An on-policy completion moves the states of the tokens after it. The exact gradient of ``E sum_t D(s_t)`` over the student's
own completions therefore has two parts: every ``D`` differentiated where it stands, and every token's score function times
the sum of the D that follow. A credit makes the advantage of a token out of its own signal and of the costs around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from opd_lightning.configurable import Configurable
from opd_lightning.ops.returns import backward_scan, discounted_future, following, windowed_future

__all__ = [
    "GAE",
    "Credit",
    "Discounted",
    "Immediate",
    "KStep",
    "LengthNormalised",
    "ReturnToGo",
    "TotalReturn",
]


class Signals(NamedTuple):
    """What a credit may use: (B, T), detached.

    Attributes:
        local: the drawn token's own signal, baseline subtracted; 0 for exact supports.
        cost: what every token costs the tokens before it.
        state_cost: the exact divergence of every state.
        mask: trainable positions.
        future_values: (B, T) what a critic predicts for `GAE.future_cost`; None without one.
    """

    local: Tensor
    cost: Tensor
    state_cost: Tensor
    mask: Tensor
    future_values: Tensor | None = None


class Credit(Configurable, ABC):
    """Attribution of costs to tokens.

    Attributes:
        gamma: discount per token of what comes later; 0 looks at nothing but the token itself.
        analytic: it uses the exact divergence of the state, instead of or beside the drawn token's (Rao-Blackwellised: the same
            mean, less noise).
        critic: a value head must be trained for it.
        bias: what separates its expected gradient from that of its target; empty if nothing.
        title: what `declared_target` prints.
    """

    gamma: float
    title: str
    analytic: bool = False
    critic: bool = False
    bias: str = ""

    @property
    def level(self) -> str:
        """What the divergence is taken over, for `declared_target`."""
        return {0.0: "token-level", 1.0: "sequence-level"}.get(self.gamma, f"discounted (gamma={self.gamma:g})")

    @abstractmethod
    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        """What multiplies the score function of every token; ascended."""


class Immediate(Credit):
    """No token answers for later ones: the token-level objective, states held fixed (GKD, OPD; gamma = 0)."""

    gamma = 0.0
    title = "immediate"

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        return signals.local


class Discounted(Credit):
    """A token answers for the k-th token after it with weight gamma^k.

    For 0 < gamma < 1 the update follows neither the token-level nor the sequence-level objective, and is the gradient of
    no scalar at all.

    Args:
        gamma: in [0, 1]; 0 is `Immediate`, 1 is `ReturnToGo`.
        analytic: later costs are exact divergences of their states instead of their drawn tokens' (Rao-Blackwellised).

    Raises:
        ValueError: if gamma is outside [0, 1].
    """

    def __init__(self, gamma: float, analytic: bool = False) -> None:
        self.gamma, self.analytic = _discount("Discounted", gamma), analytic
        self.title = f"discounted, gamma={gamma:g}" + _exactly(analytic)
        self.bias = "neither the token-level nor the sequence-level gradient, nor that of any scalar" if 0 < gamma < 1 else ""

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        cost = signals.state_cost if self.analytic else signals.cost
        return signals.local - discounted_future(cost, signals.mask, self.gamma)


class ReturnToGo(Discounted):
    """A token answers for everything after it: the exact gradient of the divergence between whole completions.

    Args:
        analytic: later costs are exact divergences of their states instead of their drawn tokens' (Rao-Blackwellised).
    """

    def __init__(self, analytic: bool = False) -> None:
        super().__init__(1.0, analytic)
        self.title = "return-to-go" + _exactly(analytic)


class TotalReturn(Credit):
    """A token answers for the whole completion, what came before it too: the same expected gradient as `ReturnToGo`, with
    more noise. It is here to be compared.
    """

    gamma = 1.0
    title = "total return"

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        total = signals.cost.where(signals.mask, 0.0).sum(-1, keepdim=True)
        return signals.local - (total - signals.cost).where(signals.mask, 0.0)


class KStep(Credit):
    """``A_t = r_t - sum_{j=1}^{k-1} gamma^j D(s_{t+j})``: a token answers for the k - 1 tokens after it, with the exact
    divergence of their states (the K-step return of KETCHUP, arXiv 2504.19024, with an analytic tail).

    With k = 1, or gamma = 0, the sum is empty: `Immediate`.

    Args:
        k: tokens that count, the token itself included; at least 1.
        gamma: discount per token, in [0, 1].

    Raises:
        ValueError: for k < 1 or gamma outside [0, 1].
    """

    def __init__(self, k: int, gamma: float = 1.0) -> None:
        if k < 1:
            raise ValueError(f"KStep(k={k}): k must be at least 1 (1 is immediate credit)")
        gamma = _discount("KStep", gamma)
        self.k, self.gamma = (k, gamma) if k > 1 and gamma > 0.0 else (1, 0.0)
        self.analytic, self.title = self.k > 1, Immediate.title
        if self.k > 1:
            self.title = f"{k} steps" + (f", gamma={gamma:g}" if gamma < 1 else "") + _exactly(True)
            self.bias = f"costs more than {k - 1} tokens later are left out" + (", nearer ones discounted" if gamma < 1 else "")

    @property
    def level(self) -> str:
        return "token-level" if self.k == 1 else f"{self.k}-step"

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        return signals.local - windowed_future(signals.state_cost, signals.mask, self.gamma, self.k - 1)


class LengthNormalised(Credit):
    """The mean of the later costs instead of their sum (MiniLLM's length normalisation, arXiv 2306.08543): long completions
    are not punished for their length.

    Args:
        gamma: discount per token, in [0, 1].
        analytic: later costs are exact divergences of their states.

    Raises:
        ValueError: if gamma is outside [0, 1].
    """

    bias = "later costs are divided by how many there are: not the gradient of the divergence between completions"

    def __init__(self, gamma: float = 1.0, analytic: bool = False) -> None:
        self.gamma, self.analytic = _discount("LengthNormalised", gamma), analytic
        self.title = f"length-normalised, gamma={gamma:g}" + _exactly(analytic)

    @property
    def level(self) -> str:
        return "length-normalised sequence-level"

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        cost = signals.state_cost if self.analytic else signals.cost
        later = signals.mask.flip(-1).cumsum(-1).flip(-1) - 1
        return signals.local - discounted_future(cost, signals.mask, self.gamma) / later.clamp(min=1)


class GAE(Credit):
    """Generalised advantage estimation (arXiv 1506.02438) on log-ratio rewards: ``A_t = sum_l (gamma lam)^l delta_{t+l}`` with
    ``delta_t = r_t + gamma V(s_{t+1}) - V(s_t)``. For other divergences r is the token's own signal at l = 0 and minus its
    cost, whose mean is - D, at every later l.

    The value is residual, ``V(s) = - D(s) + gamma W(s)``: the exact divergence of the state, and a critic W for what follows
    it, which starts at zero. At the first step, and for ever with gamma = 0, it is the closed-form baseline. A cut or ended
    completion has no value behind its last token. Proposed as a hypothesis by arXiv 2606.22793, validated by nobody yet.

    Args:
        gamma: discount per token, in [0, 1].
        lam: 1 is unbiased for the discounted return whatever the critic says; less trusts the critic more.
        train_critic: learn W; else it stays zero.

    Raises:
        ValueError: for values outside [0, 1].
    """

    analytic = True

    def __init__(self, gamma: float = 0.99, lam: float = 0.95, train_critic: bool = True) -> None:
        self.gamma, self.lam = _discount("GAE", gamma), _discount("GAE", lam)
        self.critic = train_critic and gamma > 0.0
        self.title = f"GAE, gamma={gamma:g}, lambda={lam:g}, " + ("learned critic" if self.critic else "value -D")
        biases = []
        if 0.0 < gamma < 1.0:
            biases.append("neither the token-level nor the sequence-level gradient, nor that of any scalar")
        if gamma > 0.0 and lam < 1.0:
            biases.append("off by (1 - lambda) times the critic's error at later states")
        self.bias = "; ".join(biases)

    def advantage(self, signals: Signals) -> Float[Tensor, "B T"]:
        value = -signals.state_cost
        if signals.future_values is not None:
            value = value + self.gamma * signals.future_values
        delta = self.gamma * following(value, signals.mask) - value - signals.cost
        own = (signals.local + signals.cost).where(signals.mask, 0.0)
        return own + backward_scan(delta, signals.mask, self.gamma * self.lam)

    def future_cost(self, state_cost: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, "B T"]:
        """What W learns to predict, with a minus sign: ``sum_{k>=1} gamma^{k-1} D(s_{t+k})``."""
        return discounted_future(state_cost, mask, self.gamma) / self.gamma


def _discount(name: str, gamma: float) -> float:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"{name}({gamma}): discounts must lie in [0, 1]")
    return gamma


def _exactly(analytic: bool) -> str:
    return ", later costs exact" if analytic else ""
