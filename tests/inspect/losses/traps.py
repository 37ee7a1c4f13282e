"""Losses with one well-known mistake each, as people write them."""

import torch

GAMMA = 0.8


def sampled(student_logits, teacher_logits, tokens):
    """Log-probabilities of the drawn tokens."""
    ids = tokens[..., None]
    return tuple(x.log_softmax(-1).gather(-1, ids).squeeze(-1) for x in (student_logits, teacher_logits))


def mean(values, mask):
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()


def k1(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean(p - q, mask)


def k3(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean((q - p).exp() - 1 - (q - p), mask)


def _raw_top(student_logits, teacher_logits, by):
    p, q = (x.log_softmax(-1).clamp(min=-700) for x in (student_logits, teacher_logits))
    ids = (p if by == "student" else q).topk(2, -1).indices
    return p.gather(-1, ids), q.gather(-1, ids)


def raw_top_k(student_logits, teacher_logits, tokens, mask):
    p, q = _raw_top(student_logits, teacher_logits, "student")
    return mean((p.exp() * (p - q)).sum(-1), mask)


def raw_top_k_of_the_teacher(student_logits, teacher_logits, tokens, mask):
    p, q = _raw_top(student_logits, teacher_logits, "teacher")
    return mean((q.exp() * (q - p)).sum(-1), mask)


def top_k_value_as_advantage(student_logits, teacher_logits, tokens, mask):
    p, q = _raw_top(student_logits, teacher_logits, "teacher")
    value = (p.exp() * (p - q)).sum(-1).detach()
    return mean(value * sampled(student_logits, teacher_logits, tokens)[0], mask)


def kl_as_advantage(student_logits, teacher_logits, tokens, mask):
    p, q = (x.log_softmax(-1).clamp(min=-700) for x in (student_logits, teacher_logits))
    advantage = -(p.exp() * (p - q)).sum(-1).detach()
    return -mean(advantage * sampled(student_logits, teacher_logits, tokens)[0], mask)


def renormalised_top_1(student_logits, teacher_logits, tokens, mask):
    ids = student_logits.topk(1, -1).indices
    p, q = (x.gather(-1, ids).log_softmax(-1) for x in (student_logits, teacher_logits))
    return mean((p.exp() * (p - q)).sum(-1), mask)


def _steps(mask):
    """Index of every token in its completion, whatever stands before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def gamma_t(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    reward = torch.where(mask, (q - p).detach(), torch.zeros_like(p)) * GAMMA ** _steps(mask)
    return -mean(reward.flip(-1).cumsum(-1).flip(-1) * p, mask)


def gamma_t_on_the_return(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    reward = torch.where(mask, (q - p).detach(), torch.zeros_like(p))
    return -mean(GAMMA ** _steps(mask) * reward.flip(-1).cumsum(-1).flip(-1) * p, mask)


def gamma_t_on_the_token(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return -mean(GAMMA ** _steps(mask) * (q - p).detach() * p, mask)


def padding_in_the_mean(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return ((p - q).detach() * p * mask).mean()


def no_mask(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return ((p - q).detach() * p).mean()


def no_mask_summed(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return ((p - q).detach() * p).sum()


def undetached_advantage(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return -mean((q - p) * p, mask)


def detached_weight(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return -mean((q - p) * p.detach(), mask)


def detached_weight_over_the_vocabulary(student_logits, teacher_logits, tokens, mask):
    p, q = (x.log_softmax(-1).clamp(min=-700) for x in (student_logits, teacher_logits))
    return mean((p.exp().detach() * (p - q)).sum(-1), mask)


def detached_weight_on_a_top_k(student_logits, teacher_logits, tokens, mask):
    p, q = _raw_top(student_logits, teacher_logits, "teacher")
    return mean((p.exp().detach() * (p - q)).sum(-1), mask)


def detached_probability_of_the_token(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean(p.exp().detach() * (p - q), mask)


def k3_as_advantage(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean(((q - p).exp() - 1 - (q - p)).detach() * p, mask)


def local_term_missing(student_logits, teacher_logits, tokens, mask):
    """The closed-form KL of every state, its own included, as a reward-to-go."""
    p, q = (x.log_softmax(-1).clamp(min=-700) for x in (student_logits, teacher_logits))
    kl = torch.where(mask, (p.exp() * (p - q)).sum(-1).detach(), torch.zeros_like(tokens, dtype=p.dtype))
    return mean(kl.flip(-1).cumsum(-1).flip(-1) * sampled(student_logits, teacher_logits, tokens)[0], mask)


def own_text(student_logits, teacher_logits, tokens, mask):
    return -mean(sampled(student_logits, teacher_logits, tokens)[0], mask)


def wrong_sign(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean((q - p).detach() * p, mask)


def entropy_bonus(student_logits, teacher_logits, tokens, mask):
    p, q = (x.log_softmax(-1).clamp(min=-700) for x in (student_logits, teacher_logits))
    return mean((p.exp() * (p - q) + 0.1 * p.exp() * p).sum(-1), mask)


def everything_detached(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits.detach(), teacher_logits, tokens)
    return mean(p - q, mask)


def not_minus_infinity(student_logits, teacher_logits, tokens, mask):
    p, q = (x.log_softmax(-1) for x in (student_logits, teacher_logits))
    return mean((p.exp() * (p - q)).sum(-1), mask)


def tempered_student(student_logits, teacher_logits, tokens, mask):
    """Compares at two temperatures: a student that equals its teacher is moved."""
    p, q = (student_logits / 0.5).log_softmax(-1).clamp(min=-700), teacher_logits.log_softmax(-1).clamp(min=-700)
    return mean((p.exp() * (p - q)).sum(-1), mask)


def detached_weight_with_the_other_sign(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean((q - p) * p.detach(), mask)


def hard_labels(student_logits, teacher_logits, tokens, mask):
    """The likelihood of the teacher's likeliest token: the student becomes deterministic."""
    best = teacher_logits.argmax(-1, keepdim=True)
    return -mean(student_logits.log_softmax(-1).gather(-1, best).squeeze(-1), mask)
