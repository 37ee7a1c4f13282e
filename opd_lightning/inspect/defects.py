"""The defects of token losses that an audit can name, in words that say what happens and what to write instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """Something wrong with a loss.

    Attributes:
        name: short, for programs.
        title: in plain words.
        text: what it does and what to write instead.
    """

    name: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"


DEFECTS = {
    "k1_backpropagated": (
        "k1 back-propagated",
        "log p - log q of a sampled token was differentiated as it stands. Its gradient is grad log p: zero in expectation, "
        "and the teacher is not in it. Write (log p - log q).detach() * log p.",
    ),
    "k3_backpropagated": (
        "k3 back-propagated",
        "q/p - 1 - log(q/p) has the value of the reverse KL, but its gradient follows the forward KL, with importance weights "
        "q/p of unbounded variance. Write (log p - log q).detach() * log p for the reverse KL.",
    ),
    "raw_top_k": (
        "raw top-k",
        "the sum is cut to a top-k and nothing stands for the rest, so mass moves even where student and teacher agree. Add "
        "the tail as one more entry, or renormalise both laws on the support.",
    ),
    "value_as_advantage": (
        "a value used as an advantage",
        "the weight of log p is the same for every token of a state (a KL or top-k value), so it acts as a baseline: the "
        "expected gradient is zero. Differentiate that value itself, or weight by the sampled token's log q - log p.",
    ),
    "renormalized_top_1": (
        "renormalised K=1",
        "renormalised on one entry both laws are 1 there: loss and gradient are exactly 0 for every sample. Take K of 2 or "
        "more, or close the support by a tail entry.",
    ),
    "gamma_t": (
        "gamma^t instead of gamma^(i-t)",
        "weights shrink with the position in the completion, not with the distance to the cost, so late tokens hardly learn. "
        "Divide the credit of token t by gamma^t.",
    ),
    "padding_in_mean": (
        "padding counted in the mean",
        "masked positions are counted by the divisor: the gradient shrinks with the padding of the batch. Divide by "
        "mask.sum().",
    ),
    "padding_leak": (
        "padding leaks",
        "what masked positions hold moves the loss or a gradient, or receives one. Apply the mask before every sum over time "
        "and once more at the end.",
    ),
    "undetached_advantage": (
        "un-detached advantage",
        "the advantage log q - log p is differentiated too, which adds an entropy bonus of weight 1. Detach the advantage.",
    ),
    "entropy_term": (
        "entropy term",
        "beside the reverse KL the loss moves the student's entropy, so a student that equals its teacher is moved away from "
        "it. Leave the term out, or know that the optimum is not the teacher.",
    ),
    "detached_weight": (
        "detached weight instead of detached log-prob",
        "the gradient flows through the wrong factor of weight * log-prob, and the teacher drops out of it. Write "
        "p * (log p - log q).detach() over the vocabulary, or (log p - log q).detach() * log p on a sampled token.",
    ),
    "k3_as_advantage": (
        "k3 used as an advantage",
        "the expected gradient is that of the reverse KL minus that of the forward KL, and dies out near the teacher. Use "
        "log q - log p as the advantage.",
    ),
    "local_term_missing": (
        "the token's own cost is missing",
        "a KL value of the token's own state is a baseline there: only later costs are left. Give the token its own "
        "log q - log p.",
    ),
    "own_text_likelihood": (
        "likelihood of the student's own text",
        "the student imitates what it sampled: zero in expectation, and the teacher is not in the gradient. Weight by "
        "log q - log p, or train on the teacher's text.",
    ),
    "wrong_sign": ("wrong sign", "minimising this loss ascends what it should descend. Turn the sign around."),
    "no_gradient": (
        "no gradient",
        "the loss does not depend on the student's logits, or its gradient is exactly 0 for every sample. Look for a detach(), "
        "torch.no_grad(), argmax or clamp on the way.",
    ),
    "zero_gradient": ("zero expected gradient", "the gradient is noise around zero: nothing is learned."),
    "teacher_absent": ("the teacher is absent", "another teacher gives the same gradient for every sample."),
    "moves_at_agreement": (
        "no rest at the teacher",
        "a student that equals its teacher is still moved: the optimum of this loss is not the teacher.",
    ),
    "infinite_logits": (
        "-inf logits break it",
        "a logit of -inf (a masked vocabulary entry that nobody samples) gives NaN, or changes the rest. Clamp "
        "log-probabilities from below before they are multiplied with probabilities.",
    ),
}


def defect(name: str, more: str = "") -> Defect:
    """A named defect, with what was measured about it."""
    title, text = DEFECTS[name]
    return Defect(name, title, f"{text} {more}".strip())
