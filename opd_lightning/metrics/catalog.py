"""Everything that is logged, each defined once: what it is, its unit, which way is good."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "train/loss": "Objective value, divided as the reduction says. A monitor, not a potential: for gamma < 1 it need not fall.",
    "train/critic_loss": "Half the squared error of GAE's critic, squared nats per token. Descended beside train/loss, not in "
    "it.",
    "train/reverse_kl": "KL(student ‖ teacher), nats per token over the full vocabulary, on the rollouts trained on. Falls.",
    "train/coarse_reverse_kl": "The same of the teacher's top-k and one tail entry, where a teacher server tells no more: "
    "a lower bound of it, nats per token. Falls.",
    "train/k1": "One-sample estimate of the reverse KL on the drawn tokens, signed. Equal to train/reverse_kl but for noise "
    "while the text is the student's own; a lasting difference says that it is not.",
    "train/k3": "The same with less noise, never negative (Schulman's k3). A metric: as a loss it would descend forward KL.",
    "train/student_entropy": "Entropy of the student's next-token law, nats per token. A fall to 0 is a collapse.",
    "train/teacher_entropy": "Entropy of the teacher's law on the student's states, nats per token.",
    "train/entropy_gap": "Mean of abs(teacher entropy - student entropy), nats. Falls towards 0.",
    "train/overlap": "Share of the student's top-k tokens that are in the teacher's top-k, 0 to 1. Rises in runs that succeed.",
    "train/student_overlap_mass": "Student probability on the shared top-k tokens, 0 to 1. Above 0.97 is healthy.",
    "train/teacher_overlap_mass": "Teacher probability on the shared top-k tokens, 0 to 1.",
    "train/student_top_mass": "Student probability on the student's own top-k tokens, 0 to 1. A fall against "
    "train/teacher_top_mass is a drain: probability leaks out of a truncated support.",
    "train/teacher_top_mass": "Teacher probability on the teacher's own top-k tokens, 0 to 1.",
    "train/student_reach": "Student probability of the tokens that the teacher likes more, 0 to 1. Low beside "
    "train/teacher_reach: the teacher asks for what the student cannot draw. Their difference is the total variation.",
    "train/teacher_reach": "Teacher probability of the tokens that the teacher likes more, 0 to 1.",
    "train/leak": "Of the probability that a plain policy gradient takes from suppressed drawn tokens, the share that goes to "
    "tokens that the teacher rejects too, 0 to 1. High: a route has something to do.",
    "train/overlap_advantage": "Mean advantage of the shared top-k tokens, nats, never positive. Rises towards 0.",
    "train/neg_frac": "Share of drawn tokens that the teacher finds less likely than the student does, 0 to 1.",
    "train/suppressed": "Mean of max(log p - log q, 0) over drawn tokens (p student, q teacher), nats: what is pushed down.",
    "train/raised": "Mean of max(log q - log p, 0) over drawn tokens, nats: what is pulled up. train/suppressed minus this is "
    "the imbalance; it is train/k1 exactly, so equal to train/reverse_kl but for noise.",
    "train/signal_outliers": "Share of drawn tokens whose two log-probabilities lie more than 10 nats apart, 0 to 1. Above "
    "0.01 the 99th percentile of the signal is beyond 10 nats.",
    "train/effective_sample": "Kish's effective sample size over the number of drawn tokens, (sum rho)^2 / (n sum rho^2) with "
    "rho = p / p_sampler, 0 to 1. 1 is on-policy; at 0.5 half of the tokens carry the gradient.",
    "train/ratio_deviation": "Mean of abs(p / p_sampler - 1) on sampled tokens. 0 on-policy but for rounding.",
    "train/staleness": "Optimizer steps between writing and use, mean over the student's rollouts. 0 is on-policy.",
    "train/gradient_norm": "L2 norm of the gradient before clipping.",
    "train/learning_rate": "Learning rate of the first parameter group.",
    "train/step_seconds": "Wall-clock of an optimizer step, rollouts included.",
    "rollout/completion_tokens": "Mean length of the completions of a refresh, tokens, EOS included.",
    "rollout/total_tokens": "Completion tokens of all refreshes so far, all ranks; each counts once, however often it is used.",
    "rollout/truncated": "Share of completions cut by max_new_tokens, 0 to 1. 1 minus this is the rate of "
    "end-of-sequence. A rise warns of length inflation.",
    "rollout/leak": "Share of a completion's 3-grams that stand in the teacher's prompt and not in the student's, mean over "
    "completions, 0 to 1. A rise above rollout/leak_control means that the student cites what only the teacher saw.",
    "rollout/leak_control": "The same with what the teacher was told about another prompt: what is there by chance.",
    "rollout/scored_positions": "Share of completion tokens at which a teacher with another tokenizer begins a token too, 0 to "
    "1. The others are not scored.",
    "train/matched_student_mass": "Student probability on tokens that are in both vocabularies, mean over scored positions, 0 "
    "to 1. The rest is compared by rank alone. train/reverse_kl and the entropies are of the laws given such a token.",
    "train/matched_teacher_mass": "Teacher probability on tokens that are in both vocabularies, 0 to 1.",
    "rollout/repetition": "Share of a completion's 3-grams that stood in it before, mean over completions, 0 to 1. Near "
    "1 in a loop.",
    "rollout/distinct": "Distinct 3-grams over all 3-grams of a refresh, 0 to 1. Falls where every prompt gets the same text.",
    "rollout/engine_drift": "Mean difference between the trainer's and the engine's log-probabilities of a fixed text after a "
    "refresh, nats per token. Rounding alone; more means stale weights.",
    "rollout/seconds": "Wall-clock of a refresh.",
    "rollout/tokens_per_second": "Completion tokens written per second, all ranks.",
    "cold_start/mass": "Student probability on the shared top-k tokens of a few prompts, when the cold start looks. Rises.",
    "cold_start/reverse_kl": "KL(student ‖ teacher) there, nats per token. Falls.",
    "cold_start/ends": "Teacher's probability of the end where the student ended, over the student's own, 0 to 1. Rises.",
    "cold_start/truncated": "Share of the student's completions there that the length limit cut. Falls.",
    "eval/accuracy": "Mean score of held-out completions under the grader, 0 to 1.",
    "eval/reverse_kl": "KL(student ‖ teacher), nats per token, on the student's held-out completions. Falls.",
    "eval/coarse_reverse_kl": "The same of the teacher's top-k and one tail entry (teacher servers): a lower bound. Falls.",
    "eval/completion_tokens": "Mean length of held-out completions, tokens.",
    "eval/truncated": "Share of held-out completions cut by max_new_tokens.",
    "eval/neutral_nll": "Negative log-likelihood of neutral text under the student, nats per token. Should not move.",
}
"""``eval/pass@k`` (k from the configuration) is the chance that one of k completions of a prompt is right."""


def define(key: str) -> str:
    """The definition of a logged key; empty if it is not one of ours.

    >>> define("eval/pass@4")
    'Chance that at least one of 4 completions of a held-out prompt is right, unbiased estimate.'
    """
    if key.startswith("eval/pass@"):
        k = key.removeprefix("eval/pass@")
        return f"Chance that at least one of {k} completions of a held-out prompt is right, unbiased estimate."
    if key.startswith(("train/student_entropy/", "train/teacher_entropy/")):
        kind, _, bucket = key.rpartition("/")
        return f"{METRICS[kind]} Positions {bucket} of the completion."
    if key.startswith("time/"):
        return f"Seconds of an optimizer step spent on {key.removeprefix('time/').replace('_', ' ')}, this process."
    if key.startswith("alarm/"):
        return f"1 at the optimizer step at which the alarm {key.removeprefix('alarm/')} rang."
    return METRICS.get(key, "")
