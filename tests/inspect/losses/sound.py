"""Losses that are what they say."""

import torch

FLOOR = -700.0


def laws(student_logits, teacher_logits):
    return tuple(x.log_softmax(-1).clamp(min=FLOOR) for x in (student_logits, teacher_logits))


def sampled(student_logits, teacher_logits, tokens):
    return tuple(x.gather(-1, tokens[..., None]).squeeze(-1) for x in laws(student_logits, teacher_logits))


def mean(values, mask):
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()


def reverse_kl(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    return mean((p.exp() * (p - q)).sum(-1), mask)


def reverse_kl_summed(student_logits, teacher_logits, tokens, mask):
    return 1e3 * mask.sum() * reverse_kl(student_logits, teacher_logits, tokens, mask)


def reverse_kl_of_sequences(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    per_token = (p.exp() * (p - q)).sum(-1) * mask
    return (per_token.sum(-1) / mask.sum(-1)).mean()


def reverse_kl_in_single_precision(student_logits, teacher_logits, tokens, mask):
    p, q = (x.float().log_softmax(-1).clamp(min=-80.0) for x in (student_logits, teacher_logits))
    return mean((p.exp() * (p - q)).sum(-1), mask)


def reverse_kl_by_detaching(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    return mean((p.exp() * (p - q).detach()).sum(-1), mask)


def forward_kl(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    return mean((q.exp() * (q - p)).sum(-1), mask)


def policy_gradient(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return -mean((q - p).detach() * p, mask)


def policy_gradient_with_ratio_and_baseline(student_logits, teacher_logits, tokens, mask):
    s, t = laws(student_logits, teacher_logits)
    kl = (s.exp() * (s - t)).sum(-1)
    p, q = sampled(student_logits, teacher_logits, tokens)
    return -mean((q - p + kl).detach() * (p - p.detach()).exp(), mask)


def k2(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean(0.5 * (p - q) ** 2, mask)


def half_absolute_log_ratio(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    return mean(0.5 * (p - q).abs(), mask)


def return_to_go(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    reward = torch.where(mask, (q - p).detach(), torch.zeros_like(p))
    return -mean(reward.flip(-1).cumsum(-1).flip(-1) * p, mask)


def discounted(student_logits, teacher_logits, tokens, mask):
    p, q = sampled(student_logits, teacher_logits, tokens)
    reward = torch.where(mask, (q - p).detach(), torch.zeros_like(p))
    credit, running = [], torch.zeros_like(p[:, 0])
    for t in reversed(range(p.shape[1])):
        running = torch.where(mask[:, t], reward[:, t] + 0.7 * running, running)
        credit.insert(0, running)
    return -mean(torch.stack(credit, 1) * p, mask)


def top_2_and_tail(student_logits, teacher_logits, tokens, mask):
    s, t = laws(student_logits, teacher_logits)
    ids = s.topk(2, -1).indices
    closed = []
    for law in (s, t):
        head = law.gather(-1, ids).exp()
        closed.append(torch.cat([head, 1 - head.sum(-1, keepdim=True)], -1).log())
    p, q = closed
    return mean((p.exp() * (p - q)).sum(-1), mask)


def jsd(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    return mean(0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1), mask)


def writes_into_its_inputs(student_logits, teacher_logits, tokens, mask):
    student_logits -= student_logits.max(-1, keepdim=True).values
    teacher_logits.mul_(1.0)
    tokens[~mask] = 0
    p, q = sampled(student_logits, teacher_logits, tokens)
    mask &= mask.any()
    return mean(0.5 * (p - q) ** 2, mask)


def takes_gradients_itself(student_logits, teacher_logits, tokens, mask):
    p, q = laws(student_logits, teacher_logits)
    kl = mean((p.exp() * (p - q)).sum(-1), mask)
    (inner,) = torch.autograd.grad(kl, student_logits, create_graph=True)
    return kl + 0.0 * inner.square().sum()
