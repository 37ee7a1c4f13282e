"""The loss from hidden states and heads: seconds and memory of ours, whole logits, TRL's chunked kernel and Liger's loss.

Reverse KL over the whole vocabulary, forward and backward, bfloat16, width 576; student's head trained or frozen (as with
LoRA). Time: sides take turns in two processes. Memory: growth of a fresh process per variant and size, over tokens (512 to
8 192) and over vocabulary (32k to 262k). No figure counts unless the loss and gradient of every variant agree with whole
float32 logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from harness import HERE, Worker, alternate, chosen, parser, peer_python, ratio, report, say, summary, table

OURS, PEER = ("naive", "ours"), ("trl", "liger")
TOLERANCE = 1e-5
MIB = 2**20
FILLS = 1024
"""Tokens whose logits fill the largest tile at a vocabulary of 49 152: from here on memory must not grow."""
WHOLE = {
    "times": [(1024, 49152), (512, 151936)],
    "tokens": (512, 1024, 2048, 4096, 8192),
    "vocab": (32768, 65536, 151936, 262144),
}
QUICK = {"times": [(128, 4096)], "tokens": (128, 256), "vocab": (2048, 4096)}


class Sides:
    """Both environments' processes, made where they are needed."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.peers = () if given.without_peers else PEER

    def worker(self, *variants: str) -> Worker:
        """A fresh process for variants of one environment."""
        python = peer_python(self.given.peers, "trl") if variants[0] in PEER else sys.executable
        return Worker("-".join(variants), [python, HERE / "worker_loss.py", *variants])

    def size(self, tokens: int, vocab: int, frozen: bool) -> dict[str, Any]:
        """What a worker is asked for."""
        given = self.given
        return {"tokens": tokens, "vocab": vocab, "width": given.width, "dtype": given.dtype, "frozen": frozen}

    def memory(self, variant: str, tokens: int, vocab: int, frozen: bool) -> float:
        """MiB by which a fresh process grows."""
        with self.worker(variant) as worker:
            found = float(worker.ask("memory", variant=variant, size=self.size(tokens, vocab, frozen))["bytes"]) / MIB
        say(f"  {variant}, {tokens} tokens x {vocab}{', frozen head' if frozen else ''}: +{found:.0f} MiB")
        return round(found, 1)


def timed(sides: Sides, sizes: list[tuple[int, int]], given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every variant; trained head for all, frozen head for the naive loss and ours."""
    found: dict[str, Any] = {}
    workers = [sides.worker(*OURS), *([sides.worker(*sides.peers)] if sides.peers else [])]
    home = {variant: worker for worker, names in zip(workers, (OURS, sides.peers), strict=False) for variant in names}
    try:
        agreed = {v: w.ask("check", variant=v, size=sides.size(64, 4096, False)) for v, w in home.items()}
        for variant, errors in agreed.items():
            say(f"  {variant}: relative error of loss {errors['loss_error']:.1e}, of gradient {errors['gradient_error']:.1e}")
            if not max(errors.values()) <= TOLERANCE:
                raise SystemExit(f"{variant} is not the naive loss: no timing counts")
        for tokens, vocab in sizes:
            for frozen in (False, True):
                names = [v for v in home if not frozen or v in OURS]
                say(f"{tokens} tokens x {vocab} entries{', frozen head' if frozen else ''}:")
                asked = {v: _order(home[v], v, sides.size(tokens, vocab, frozen)) for v in names}
                taken = alternate(asked, given.rounds, given.warmup, workers)
                found[f"{tokens}x{vocab}{'-frozen' if frozen else ''}"] = {v: summary(s) for v, s in taken.items()}
    finally:
        for worker in workers:
            worker.close()
    return {"agreement": agreed, "sizes": found, "versions": workers[-1].ready["versions"]}


def _order(worker: Worker, variant: str, size: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    return lambda: worker.ask("time", variant=variant, size=size)


def grown(sides: Sides, cases: list[str], sizes: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """MiB of every variant at every size."""
    found: dict[str, Any] = {}
    if "tokens" in cases:
        vocab = sizes["times"][0][1]
        found["tokens"] = {
            tokens: {
                **{v: sides.memory(v, tokens, vocab, False) for v in (*OURS, *sides.peers)},
                "ours-frozen": sides.memory("ours", tokens, vocab, True),
            }
            for tokens in sizes["tokens"]
        }
    if "vocab" in cases:
        tokens = given.vocab_tokens if not given.quick else 128
        found["vocab"] = {
            vocab: {
                **{v: sides.memory(v, tokens, vocab, False) for v in (*OURS, *sides.peers)},
                **{f"{v}-frozen": sides.memory(v, tokens, vocab, True) for v in OURS},
            }
            for vocab in sizes["vocab"]
        }
    if "large" in cases and not given.quick:
        found["large"] = {"8192x262144": {"ours-frozen": sides.memory("ours", 8192, 262144, True)}}
    return found


def judged(times: Mapping[str, Any], memory: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """How much faster than each, and how memory goes with tokens and vocabulary."""
    ratios: dict[str, Any] = {}
    for size, found in times.get("sizes", {}).items():
        ratios[size] = {f"faster_than_{v}": round(1.0 / ratio(found["ours"], s), 4) for v, s in found.items() if v != "ours"}
    for side in ("ours", "ours-frozen") if "tokens" in memory else ():
        least = 0 if given.quick else FILLS
        # Less what is asked for. Tokens that do not fill what may be alive at once need less than that.
        own = {int(t): m[side] - int(t) * given.width * 2 / MIB for t, m in memory["tokens"].items() if int(t) >= least}
        ratios[f"tokens_slope_{side}"] = round(max(own.values()) / max(min(own.values()), 1e-9) - 1.0, 4)
    for vocab, found in memory.get("vocab", {}).items():
        ratios[f"share_of_naive_{vocab}"] = round(found["ours"] / found["naive"], 4)
        ratios[f"share_of_naive_{vocab}_frozen"] = round(found["ours-frozen"] / found["naive"], 4)
    if "large" in memory:
        ratios["large_frozen_mib"] = memory["large"]["8192x262144"]["ours-frozen"]
    return ratios


def page(times: Mapping[str, Any], memory: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    """The Markdown."""
    parts = []
    if times:
        names = (*OURS, *PEER)
        rows = [[s, *(f[v]["median"] if v in f else "" for v in names)] for s, f in times["sizes"].items()]
        parts.append("## Seconds, forward and backward\n\n" + table(["tokens x vocabulary", *names], rows))
    for axis, found in memory.items():
        names = tuple(next(iter(found.values())))
        rows = [[size, *(f"{m[v]:.0f}" for v in names)] for size, m in found.items()]
        parts.append(f"## Memory over {axis} (MiB of growth)\n\n" + table([axis, *names], rows))
    lines = "\n".join(f"- {k}: {v}" for k, v in ratios.items())
    told = (
        f"`tokens_slope`: largest over smallest growth from {FILLS} tokens on, less one, without the hidden states' gradient."
    )
    return "\n\n".join([*parts, f"## Ratios\n\n{lines}\n\n{told}"])


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=7)
    made.add_argument("--width", type=int, default=576)
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--vocab-tokens", type=int, default=2048, help="tokens at which the vocabulary is varied")
    made.add_argument("--without-peers", action="store_true", help="ours and the naive loss alone")
    given = made.parse_args()
    cases = chosen(given, ["time", "tokens", "vocab", "large"])
    sizes: Mapping[str, Any] = WHOLE
    if given.quick:
        sizes, given.rounds, given.width = QUICK, min(given.rounds, 2), 64
    sides = Sides(given)
    times = timed(sides, sizes["times"], given) if "time" in cases else {}
    memory = grown(sides, cases, sizes, given)
    ratios = judged(times, memory, given)
    report(given, "loss", ratios, {"time": times, "memory": memory}, page(times, memory, ratios))


if __name__ == "__main__":
    main()
