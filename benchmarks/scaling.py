"""How seconds and memory of our whole optimizer step grow with the rows of a batch and with the length of completions.

Every size is an `opd fit` in a fresh process, one after the other; equal lengths, no completion ends early.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import BUILD, alternate, chosen, exponent, fit_worker, parser, report, say, summary, table
from pairs import fit_config, prepare

PHASES = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "other")


def measured(given: argparse.Namespace, rows: int, new_tokens: int) -> dict[str, Any]:
    """Steps of one size."""
    say(f"{rows} rows of {given.prompt_tokens} + {new_tokens} tokens:")
    pair = prepare(given.pair, max(64, rows), given.prompt_tokens)
    file: Path = BUILD / "scaling" / f"{rows}x{new_tokens}.yaml"
    config = fit_config(file, pair, given.dtype, rows, new_tokens)
    with fit_worker(given, config) as worker:
        taken = alternate({"ours": lambda: worker.ask("step")}, given.rounds, given.warmup, [worker])["ours"]
    found = summary(taken)
    found["peak_rss"] = taken[-1].extra["peak_rss"]
    found["tokens_per_second"] = round(rows * new_tokens / found["median"], 1)
    return found


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--pair", choices=["smollm2", "tiny"], default="smollm2")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--rows", type=int, nargs="*", default=[4, 8, 16, 32], help="batch sizes, at 128 new tokens")
    made.add_argument("--lengths", type=int, nargs="*", default=[32, 64, 128, 256, 512], help="new tokens, at 8 rows")
    given = made.parse_args()
    cases = chosen(given, ["rows", "lengths"])
    fixed = {"rows": 8, "new": 128}
    if given.quick:
        given.pair, given.rounds, given.rows, given.lengths, fixed = "tiny", 1, [2, 4], [8, 16], {"rows": 2, "new": 8}
    found: dict[str, dict[int, Any]] = {}
    if "rows" in cases:
        found["rows"] = {rows: measured(given, rows, fixed["new"]) for rows in given.rows}
    if "lengths" in cases:
        found["lengths"] = {new: measured(given, fixed["rows"], new) for new in given.lengths}
    ratios, parts = {}, []
    for axis, sizes in found.items():
        ratios[axis] = {"exponent": exponent(list(sizes), [f["median"] for f in sizes.values()])}
        if len(sizes) > 1 and all(f["phases"].get("rollout") for f in sizes.values()):
            ratios[axis]["rollout_exponent"] = exponent(list(sizes), [f["phases"]["rollout"] for f in sizes.values()])
        lines = [
            [
                size,
                f["median"],
                f["tokens_per_second"],
                *(f["phases"].get(p, 0.0) for p in PHASES),
                f"{f['peak_rss'] / 2**20:.0f}",
            ]
            for size, f in sizes.items()
        ]
        head = [axis, "step (s)", "tokens/s", *PHASES, "peak RSS (MiB)"]
        told = ", ".join(f"{k} {v}" for k, v in ratios[axis].items())
        parts.append(f"## {axis}\n\n{table(head, lines)}\n\nOver {axis}: {told}.")
    report(given, "scaling", ratios, {"sizes": found}, "\n\n".join(parts))


if __name__ == "__main__":
    main()
