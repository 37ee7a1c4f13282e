"""A whole optimizer step of ours against TRL's GKDTrainer and DistillationTrainer: same models, prompts, lengths and objective.

Every step writes its own rollouts (8 prompts of 64 tokens, 128 new ones, no completion ends early), scores them with both
models, and takes one optimizer step on the reverse KL. All sides are processes that live through the whole run and take turns,
step by step. The peers get their best settings (see worker_trl.py), and with float32 weights both sides also run with
`torch.set_float32_matmul_precision("medium")`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from harness import (
    BUILD,
    RESULTS,
    Sample,
    Worker,
    alternate,
    chosen,
    commit,
    fit_worker,
    machine,
    parser,
    peer_python,
    ratio,
    report,
    say,
    summary,
    table,
    trl_worker,
)
from pairs import Pair, fit_config, prepare

CASES = {"bf16": ("smollm2", "bfloat16"), "fp32": ("smollm2", "float32"), "tiny": ("tiny", "float32")}
PEERS = ("gkd", "distillation")
PHASES = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "other")
TOLERANCE = 1e-5
MEDIUM = "@medium"


def start(given: argparse.Namespace, case: str, pair: Pair) -> dict[str, Worker]:
    """One process a side, its models loaded."""
    dtype, scratch = CASES[case][1], BUILD / "vs_trl" / case
    python = peer_python(given.peers, "trl")
    config = fit_config(scratch / "ours.yaml", pair, dtype, given.rows, given.new_tokens)
    workers = {"ours": fit_worker(given, config)}
    for name in PEERS:
        workers[name] = trl_worker(given, name, python, scratch, pair, dtype=dtype)
    return workers


def step(worker: Worker, matmul: str) -> Callable[[], Mapping[str, Any]]:
    """One optimizer step of a side."""
    return lambda: worker.ask("step", matmul=matmul)


def run(given: argparse.Namespace, case: str) -> dict[str, Any]:
    """Time a case; agreement is proven on the models that were just trained.

    Raises:
        SystemExit: if our loss or gradient is not the naive one, or the sides did not write equally many tokens.
    """
    name, dtype = CASES[case]
    pair = prepare(name, max(64, given.rows * (given.rounds + given.warmup)), given.prompt_tokens)
    workers = start(given, case, pair)
    try:
        sides = {who: step(worker, "highest") for who, worker in workers.items()}
        if dtype == "float32" and not given.skip_medium:
            sides |= {f"{who}{MEDIUM}": step(worker, "medium") for who, worker in workers.items()}
        taken = alternate(sides, given.rounds, given.warmup, list(workers.values()))
        agreed = workers["ours"].ask("check")
    finally:
        for worker in workers.values():
            worker.close()
    say(f"  {case}: relative error of our loss {agreed['loss_error']:.1e}, of our gradient {agreed['gradient_error']:.1e}")
    if not max(agreed.values()) <= TOLERANCE:
        raise SystemExit(f"{case}: loss or gradient differs from the naive one by more than {TOLERANCE:g}: no timing counts")
    expected = given.rows * given.new_tokens
    if wrong := {who: s[-1].extra["tokens"] for who, s in taken.items() if s[-1].extra["tokens"] != expected}:
        raise SystemExit(f"{case}: {wrong} completion tokens a step instead of {expected}")
    return judged(taken, {who: w.ready["versions"] for who, w in workers.items()}, agreed)


def judged(taken: Mapping[str, list[Sample]], versions: Mapping[str, Any], agreed: Mapping[str, float]) -> dict[str, Any]:
    """Medians, memory and ratios of one case."""
    sides = {who: summary(samples) for who, samples in taken.items()}
    memory = {who: taken[who][-1].extra["peak_rss"] for who in ("ours", *PEERS)}
    ratios = {f"vs_{peer}": ratio(sides["ours"], sides[peer]) for peer in PEERS}
    ratios["vs_fastest"] = max(ratios.values())
    ratios["peak_rss"] = round(memory["ours"] / min(memory[peer] for peer in PEERS), 4)
    if f"ours{MEDIUM}" in sides:
        medium = [ratio(sides[f"ours{MEDIUM}"], sides[f"{peer}{MEDIUM}"]) for peer in PEERS]
        ratios["vs_fastest_both_medium"] = max(medium)
        ratios["vs_fastest_peer_medium"] = max(ratio(sides["ours"], sides[f"{peer}{MEDIUM}"]) for peer in PEERS)
    of_case = {"versions": versions, "agreement": agreed, "commit": commit()}
    return {"ratios": ratios, "sides": sides, "peak_rss": memory, **of_case}


def kept(given: argparse.Namespace) -> dict[str, Any]:
    """Cases of the last results, which stay where only others are run."""
    file = (given.out or RESULTS) / "vs_trl.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else {}
    return {case: {"commit": "unknown", **result} for case, result in found.items()}


def page(found: Mapping[str, Any]) -> str:
    """The Markdown of all cases."""
    parts = []
    for case, result in found.items():
        rows = []
        for who, side in result["sides"].items():
            rss = result["peak_rss"].get(who)
            phases = [side["phases"].get(p, 0.0) for p in PHASES]
            rows.append([who, side["median"], *phases, f"{rss / 2**20:.0f}" if rss else "", side["others"]])
        ratios = ", ".join(f"{k} **{v}**" for k, v in result["ratios"].items())
        head = ["side", "step (s)", *PHASES, "peak RSS (MiB)", "others"]
        parts.append(f"## {case}\n\nOurs over theirs, commit {result['commit']}: {ratios}.\n\n{table(head, rows)}")
    peers = next(iter(found.values()))["versions"]["gkd"]
    told = ", ".join(f"{k} {v}" for k, v in peers.items())
    note = (
        f"Peers: {told}. `others`: largest share of the machine that other processes used during a counted repetition. "
        "`loss` holds the heads. A gradient that is computed with the loss counts as loss, not as backward."
    )
    return "\n\n".join([*parts, note])


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=7)
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--skip-medium", action="store_true", help="leave out float32 products at medium precision")
    given = made.parse_args()
    cases = chosen(given, list(CASES))
    if given.quick:
        given.rounds, given.new_tokens, given.skip_medium = min(given.rounds, 1), 16, True
        cases = given.only or ["tiny"]
    say(f"vs_trl on {machine()['cpu']}: {', '.join(cases)}")
    found = kept(given) if len(cases) < len(CASES) and not given.quick else {}
    for case in cases:
        say(f"{case}:")
        found[case] = run(given, case)
    found = {case: found[case] for case in CASES if case in found}
    report(given, "vs_trl", {case: r["ratios"] for case, r in found.items()}, {"cases": found}, page(found))


if __name__ == "__main__":
    main()
