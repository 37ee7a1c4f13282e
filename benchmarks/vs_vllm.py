"""Our sampler against transformers' generate and vLLM on the CPU: tokens per second, and how time grows with length.

The student is SmolLM2-135M with every second layer taken out, bfloat16 weights. Batches of 8, 32 and 128 prompts of 64 random
tokens are continued by 128 tokens at temperature 1; nothing ends early. Then 64 to 512 new tokens at batch 8, with the exponent
of time over new tokens. vLLM runs compiled, its threads bound to all cores, with tcmalloc and Intel's OpenMP where they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness import HERE, Worker, alternate, chosen, exponent, parser, peer_python, ratio, report, say, summary, table
from opd_lightning.models.loading import load_config
from pairs import prepare
from peers import preloads

ENGINES = ("ours", "hf", "vllm")


def start(given: argparse.Namespace, longest: int) -> dict[str, Worker]:
    """One process an engine."""
    pair = prepare(given.pair, 64)
    workers = {
        name: Worker(name, [sys.executable, HERE / "worker_write.py", "--engine", name, "--model", pair.student])
        for name in ("ours", "hf")
    }
    if given.without_vllm:
        return workers
    cores = os.cpu_count() or 1
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "OMP_NUM_THREADS": str(cores),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LD_PRELOAD": preloads(given.peers.resolve() / "vllm"),
    }
    vocab = load_config(str(pair.student)).vocab_size
    rows = max(given.rows)
    words: list[Any] = ["--model", pair.student, "--rows", rows, "--tokens", longest + given.prompt_tokens, "--vocab", vocab]
    words += ["--eager"] if given.quick else []
    workers["vllm"] = Worker("vllm", [peer_python(given.peers, "vllm"), HERE / "worker_vllm.py", *words], env)
    return workers


def order(worker: Worker, rows: int, prompt_tokens: int, new_tokens: int) -> Callable[[], Mapping[str, Any]]:
    """One batch of an engine."""

    def write() -> Mapping[str, Any]:
        got = worker.ask("write", rows=rows, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        if got["tokens"] != rows * new_tokens:
            raise SystemExit(f"{worker.name} wrote {got['tokens']} tokens instead of {rows} x {new_tokens}")
        return got

    return write


def timed(given: argparse.Namespace, workers: Mapping[str, Worker], rows: int, new_tokens: int) -> dict[str, Any]:
    """All engines on one size, in turn."""
    sides = {name: order(worker, rows, given.prompt_tokens, new_tokens) for name, worker in workers.items()}
    taken = alternate(sides, given.rounds, given.warmup, list(workers.values()))
    found = {name: summary(samples) for name, samples in taken.items()}
    for name, side in found.items():
        side["tokens_per_second"] = round(rows * new_tokens / side["median"], 1)
        side["peak_rss"] = taken[name][-1].extra["peak_rss"]
    return found


def judged(given: argparse.Namespace, batches: Mapping[int, Any], lengths: Mapping[int, Any]) -> dict[str, Any]:
    """Our tokens per second over theirs, and the exponents."""
    ratios: dict[str, Any] = {}
    for rows, found in batches.items():
        ratios[f"batch_{rows}"] = {f"vs_{n}": round(1.0 / ratio(found["ours"], found[n]), 4) for n in found if n != "ours"}
    if len(lengths) > 1:
        names = next(iter(lengths.values()))
        ratios["exponent"] = {n: exponent(list(lengths), [f[n]["median"] for f in lengths.values()]) for n in names}
    return ratios


def page(batches: Mapping[int, Any], lengths: Mapping[int, Any], ratios: Mapping[str, Any]) -> str:
    """The Markdown."""
    names = [n for n in ENGINES if n in next(iter({**batches, **lengths}.values()))]
    parts = []
    if batches:
        rows = [[b, *(f[n]["tokens_per_second"] for n in names), *ratios[f"batch_{b}"].values()] for b, f in batches.items()]
        head = ["batch", *(f"{n} (tokens/s)" for n in names), *(f"ours / {n}" for n in names if n != "ours")]
        parts.append("## Tokens per second\n\n" + table(head, rows))
    if lengths:
        rows = [[length, *(f[n]["median"] for n in names)] for length, f in lengths.items()]
        rows += [["exponent", *(ratios["exponent"][n] for n in names)]] if "exponent" in ratios else []
        parts.append("## New tokens\n\n" + table(["new tokens", *(f"{n} (s)" for n in names)], rows))
    return "\n\n".join(parts)


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--pair", choices=["smollm2", "tiny"], default="smollm2", help="whose student writes")
    made.add_argument("--rows", type=int, nargs="*", default=[8, 32, 128], help="batch sizes")
    made.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512], help="new tokens at the smallest batch")
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--without-vllm", action="store_true", help="where it cannot be installed")
    given = made.parse_args()
    cases = chosen(given, ["batch", "length"])
    if given.quick:
        given.rounds, given.rows, given.lengths, given.new_tokens = 1, [8, 32], [16, 32], 16
    say(f"vs_vllm: {torch.get_num_threads()} threads for every engine")
    workers = start(given, max([given.new_tokens, *given.lengths]))
    batches: dict[int, Any] = {}
    lengths: dict[int, Any] = {}
    try:
        for rows in given.rows if "batch" in cases else []:
            say(f"batch {rows}:")
            batches[rows] = timed(given, workers, rows, given.new_tokens)
        for length in given.lengths if "length" in cases else []:
            say(f"{length} new tokens:")
            lengths[length] = timed(given, workers, min(given.rows), length)
        versions = {name: worker.ready["versions"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    ratios = judged(given, batches, lengths)
    record = {"batches": batches, "lengths": lengths, "versions": versions}
    report(given, "vs_vllm", ratios, record, page(batches, lengths, ratios))


if __name__ == "__main__":
    main()
