"""Scoring G rollouts of one prompt: our forward, which may share the prompt, against the padded Hugging Face forward.

G = 8 completions of 64 tokens behind one prompt of 512, teacher forward and student forward with backward, bfloat16.
Nothing counts unless the hidden states at the completion tokens agree in float32. The ideal is the ratio of tokens,
G (P + C) / (P + G C).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import alternate, chosen, parser, ratio, report, say, summary, table
from opd_lightning.models.distributions import laws_of, pack_rows
from opd_lightning.types import Rendering
from pairs import load, prepare

TOLERANCE = 1e-5


def group(rows: int, prompt: int, new: int, vocab: int) -> Rendering:
    """Random completions behind one random prompt."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randint(10, vocab, (prompt,), generator=draw).tolist()
    written = torch.randint(10, vocab, (rows, new), generator=draw).tolist()
    return Rendering.of([shared] * rows, written, 0)


def plain(model: Any, text: Rendering) -> Tensor:
    """(N, D) hidden states at the completion positions, every row whole, as transformers computes them."""
    mask = torch.arange(text.ids.shape[1]) < text.lengths[:, None]
    hidden: Tensor = model.get_decoder()(input_ids=text.ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return hidden[:, :-1][text.mask]


def shared(model: Any, text: Rendering, vocab: int) -> Tensor:
    """The same as a training step computes them."""
    return laws_of(model, text, vocab).hidden


def forward(compute: Callable[[], Tensor]) -> Callable[[], None]:
    """Without gradient."""

    def run() -> None:
        with torch.no_grad():
            compute()

    return run


def forward_backward(compute: Callable[[], Tensor], model: Any) -> Callable[[], None]:
    """With the gradient of all weights."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        compute().float().square().sum().backward()

    return run


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=7)
    made.add_argument("--pair", choices=["smollm2", "tiny"], default="smollm2")
    made.add_argument("--group", type=int, default=8)
    made.add_argument("--prompt-tokens", type=int, default=512)
    made.add_argument("--new-tokens", type=int, default=64)
    given = made.parse_args()
    cases = chosen(given, ["teacher", "student"])
    if given.quick:
        given.pair, given.rounds = "tiny", min(given.rounds, 3)
    pair = prepare(given.pair, 64)
    folders = {"teacher": pair.teacher, "student": pair.student}
    found: dict[str, Any] = {}
    for who in cases:
        exact: Any = load(folders[who], "float32").eval()
        pack_rows(exact)
        vocab = exact.config.vocab_size
        small = group(3, 32, 8, vocab)
        with torch.no_grad():
            ours, theirs = shared(exact, small, vocab), plain(exact, small)
        error = float((ours - theirs).norm() / theirs.norm())
        say(f"{who}: relative error of the hidden states in float32 {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"{who}: the hidden states differ by more than {TOLERANCE:g}: no timing counts")
        del exact
        model, padded = (load(folders[who], "bfloat16").train(who == "student") for _ in range(2))
        pack_rows(model)
        text = group(given.group, given.prompt_tokens, given.new_tokens, vocab)
        sides: dict[str, Callable[[], Tensor]] = {
            "ours": partial(shared, model, text, vocab),
            "padded": partial(plain, padded, text),
        }
        models = {"ours": model, "padded": padded}
        timed = {n: forward(f) if who == "teacher" else forward_backward(f, models[n]) for n, f in sides.items()}
        taken = alternate(timed, given.rounds, given.warmup)
        found[who] = {n: summary(s) for n, s in taken.items()}
    rows, prompt, new = given.group, given.prompt_tokens, given.new_tokens
    ideal = round(rows * (prompt + new) / (prompt + rows * new), 3)
    ratios = {who: round(1.0 / ratio(f["ours"], f["padded"]), 4) for who, f in found.items()} | {"ideal": ideal}
    lines = [[who, f["padded"]["median"], f["ours"]["median"], ratios[who]] for who, f in found.items()]
    text_ = table(["forward (student: and backward)", "padded (s)", "ours (s)", "times faster"], lines)
    report(given, "prefix", ratios, {"sides": found}, f"{text_}\n\nIdeal by tokens: {ideal}.")


if __name__ == "__main__":
    main()
