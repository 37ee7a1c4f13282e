"""Completions that end by themselves: how much of the ideal gain over equal lengths is reached.

SmolLM2-135M-Instruct answers everyday questions, at most 256 tokens each. `natural` writes and scores the answers as they are;
`padded` writes and scores as many rows that all have the longest length. The ideal gain is the ratio of their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gate import NEVER
from harness import alternate, chosen, parser, ratio, report, say, summary, table
from opd_lightning import memory
from opd_lightning.data import ChatTemplate
from opd_lightning.models.distributions import laws_of, pack_rows
from opd_lightning.models.loading import load_tokenizer
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.paths import data_file
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Rendering
from pairs import load, prepare

QUESTIONS = "package:opd_lightning/data/sets/user_questions.jsonl"


def filled(rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Every row repeated until it has the length."""
    return [(list(row) * (length // max(len(row), 1) + 1))[:length] for row in rows]


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--rows", type=int, default=32)
    made.add_argument("--cap", type=int, default=256, help="longest completion")
    made.add_argument("--dtype", default="bfloat16")
    given = made.parse_args()
    cases = chosen(given, ["rollout", "teacher", "student"])
    if given.quick:
        given.rows, given.cap, given.rounds = 4, 32, 1
    memory.keep_freed()  # as a fit does
    folder = prepare("smollm2", 64).teacher
    model: Any = load(folder, given.dtype).eval()
    if not pack_rows(model):
        raise SystemExit("what takes padding out does not fit this model")
    vocabulary = Vocabulary.of(load_tokenizer(str(folder)))
    lines = data_file(QUESTIONS).read_text(encoding="utf-8").splitlines()[: given.rows]
    prompts = ChatTemplate().ids([json.loads(line) for line in lines], vocabulary.tokenizer)
    seeds = list(range(len(prompts)))

    def write(limit: int, words: Vocabulary) -> list[tuple[int, ...]]:
        sampler = NativeSampler(max_new_tokens=limit, batch_size=given.rows)
        return [c.ids for c in sampler.write(model, prompts, seeds, words, 0)]

    natural = write(given.cap, vocabulary)
    lengths = sorted(map(len, natural))
    longest = lengths[-1]
    say(f"{len(lengths)} completions: mean {sum(lengths) / len(lengths):.0f}, longest {longest}")
    endless = replace(vocabulary, eos_ids=NEVER)
    whole = max(map(len, prompts)) + longest
    texts = {
        "natural": Rendering.of(prompts, natural, vocabulary.pad_id),
        "padded": Rendering.of(filled(prompts, whole - longest), filled(natural, longest), vocabulary.pad_id),
    }

    def teach(text: Rendering) -> None:
        with torch.no_grad():
            laws_of(model, text, vocabulary.size)

    def learn(text: Rendering) -> None:
        model.zero_grad(set_to_none=True)
        laws_of(model, text, vocabulary.size).hidden.float().square().sum().backward()

    def wrote(limit: int, words: Vocabulary) -> None:
        write(limit, words)

    sides: dict[str, dict[str, Callable[[], None]]] = {
        "rollout": {"natural": partial(wrote, given.cap, vocabulary), "padded": partial(wrote, longest, endless)},
        "teacher": {name: partial(teach, text) for name, text in texts.items()},
        "student": {name: partial(learn, text) for name, text in texts.items()},
    }
    slots = texts["padded"].ids.numel() / float(texts["natural"].lengths.sum())
    ideal = {"rollout": len(lengths) * longest / sum(lengths), "teacher": slots, "student": slots}
    found, ratios, rows = {}, {}, []
    for case in cases:
        say(f"{case}:")
        found[case] = {n: summary(s) for n, s in alternate(sides[case], given.rounds, given.warmup).items()}
        gain = 1.0 / ratio(found[case]["natural"], found[case]["padded"])
        ratios[case] = {"gain": round(gain, 4), "ideal": round(ideal[case], 4), "of_ideal": round(gain / ideal[case], 4)}
        rows.append([case, found[case]["padded"]["median"], found[case]["natural"]["median"], *ratios[case].values()])
    text = table(["", "padded (s)", "natural (s)", "gain", "ideal gain", "gain / ideal"], rows)
    report(given, "natural_lengths", ratios, {"lengths": lengths, "sides": found}, text)


if __name__ == "__main__":
    main()
