"""What monitors cost: the same optimizer step with and without them, two `opd fit` that take turns.

With: entropy by position and the map of positions, top-16 agreement of both models, a table of completions at every step. Token
records take 5 ms of each of the twenty steps of a run that they look at (quickstart, one core) and are on.
"""

from __future__ import annotations

from typing import Any

from harness import BUILD, alternate, chosen, fit_worker, parser, ratio, report, summary, table
from pairs import fit_config, prepare

MONITORS: tuple[dict[str, Any], ...] = (
    {"class_path": "AgreementMonitor", "init_args": {"k": 16}},
    {"class_path": "EntropyMonitor", "init_args": {"edges": [16, 64]}},
    {"class_path": "CompletionTable", "init_args": {"every_n_steps": 1}},
)
OFF: tuple[dict[str, Any], ...] = (
    {"class_path": "PositionMap", "init_args": {"lines": 0}},
    {"class_path": "TokenRecords", "init_args": {"looks": 0}},
)
"""On in every fit."""


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=9)
    made.add_argument("--pair", choices=["smollm2", "tiny"], help="one pair alone")
    given = made.parse_args()
    cases = [given.pair] if given.pair else chosen(given, ["smollm2", "tiny"])
    if given.quick:
        cases, given.rounds = ["tiny"], 2
    found, ratios, rows = {}, {}, []
    for name in cases:
        pair, dtype = prepare(name, 64), "bfloat16" if name == "smollm2" else "float32"
        workers = {}
        for side, callbacks in (("without", OFF), ("with", MONITORS)):
            file = BUILD / "monitors" / f"{name}-{side}.yaml"
            config = fit_config(file, pair, dtype, 8, 16 if given.quick else 128, callbacks=callbacks)
            workers[side] = fit_worker(given, config, name=f"{side}-monitors")
        try:
            sides = {side: lambda worker=worker: worker.ask("step") for side, worker in workers.items()}
            taken = alternate(sides, given.rounds, given.warmup, list(workers.values()))
        finally:
            for worker in workers.values():
                worker.close()
        found[name] = {side: summary(samples) for side, samples in taken.items()}
        ratios[name] = ratio(found[name]["with"], found[name]["without"])
        medians = [found[name][side]["median"] for side in ("without", "with")]
        framework = [found[name][side]["phases"]["other"] for side in ("without", "with")]
        rows.append([name, *medians, ratios[name], *(1000.0 * s for s in framework)])
    head = ["pair", "without (s)", "with (s)", "with / without", "other, without (ms)", "other, with (ms)"]
    note = "`other`: what Lightning, the callbacks and the loggers take, outside models, loss, backward and optimizer."
    report(given, "monitors", ratios, {"sides": found}, table(head, rows) + "\n\n" + note)


if __name__ == "__main__":
    main()
