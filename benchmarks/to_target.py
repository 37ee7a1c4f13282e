"""Wall-clock to a fixed held-out KL on the bundled addition pair: ours against TRL's GKDTrainer.

Both sides train the same student from the same weights on the same prompts with the same batch, optimizer, constant learning
rate and gradient clipping, one optimizer step per rollout, completions that may end. They take turns step by step; only the
steps themselves are on the clock, and the first one, in which a process sets up its memory, counts as long as the median of
those that follow. Each saves its student every few steps, and one and the same code measures all of them afterwards: reverse
KL per token on completions that the saved student writes behind held-out prompts.

Ours runs twice: with float32 products as such, and with `float32_matmul: medium`, which rounds them to bfloat16 on processors
with tiles. TRL's trainer runs with the former, which is its faster setting (`vs_trl.py --only tiny` shows both).

Several seeds. A single curve jumps by half of its height from one measurement to the next, so the seconds are read off each
side's mean curve (geometric, over seeds); what every seed alone gives stands beside it. The curves over steps must agree within
their noise, or the seconds compare different things.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from harness import BUILD, HERE, Worker, alternate, fit_worker, parser, peer_python, report, say, table
from opd_lightning.data import Addition, PlainTemplate
from opd_lightning.models.distributions import laws_of
from opd_lightning.models.loading import load_model, load_tokenizer, resolve
from opd_lightning.models.vocabulary import Vocabulary
from opd_lightning.objectives import Objective, ReverseKL
from opd_lightning.samplers import NativeSampler
from opd_lightning.types import Prompt, Rollout
from pairs import Pair, fit_config

BETAS = (0.9, 0.98)
SIDES = ("ours", "ours@medium", "gkd")


def data() -> Pair:
    """The pair of the zoo with its training prompts, written down for both sides."""
    student, teacher = (Path(resolve(f"zoo/addition/{who}")) for who in ("student", "teacher"))
    tokenizer, template = load_tokenizer(str(student)), PlainTemplate()
    rows = Addition(digits=4).rows(10000, 10, "train")
    lines = [json.dumps({"prompt": r["prompt"], "full": template.text(r, tokenizer)}) for r in rows]
    file = BUILD / "to_target" / "prompts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    longest = max(map(len, template.ids(rows, tokenizer)))
    return Pair(student, teacher, file, longest)


def held_out_kl(folder: Path, teacher: Any, count: int) -> float:
    """Nats per token of KL(student ‖ teacher) on the student's own completions of held-out prompts."""
    model: Any = load_model(str(folder)).eval()
    vocabulary = Vocabulary.of(load_tokenizer(resolve("zoo/addition/student")))
    template = PlainTemplate()
    rows = Addition(digits=4).rows(count, 11, "held_out")
    tokens = template.ids(rows, vocabulary.tokenizer)
    prompts = [Prompt(i, r["prompt"], ids) for i, (r, ids) in enumerate(zip(rows, tokens, strict=True))]
    sampler = NativeSampler(max_new_tokens=48, batch_size=256)
    written = sampler.write(model, [p.ids for p in prompts], list(range(count)), vocabulary, 0)
    rollout = Rollout.of(prompts, written, vocabulary.pad_id)
    with torch.no_grad():
        ours, theirs = (laws_of(m, rollout.text, vocabulary.size) for m in (model, teacher))
        return float(Objective(ReverseKL())(ours, theirs, rollout).loss)


def train(given: argparse.Namespace, pair: Pair, seed: int, folder: Path) -> dict[str, list[tuple[int, float, Path]]]:
    """(steps, seconds, folder of the student) of every saved student of all sides."""
    settings = {"eos": True, "lr": given.learning_rate, "betas": list(BETAS)}
    configs = {
        name: fit_config(folder / f"{name}.yaml", pair, "float32", given.rows, 48, **settings)
        for name in SIDES
        if name != "gkd"
    }
    flags: dict[str, object] = {
        "trainer": "gkd",
        "student": pair.student,
        "teacher": pair.teacher,
        "prompts": pair.prompts,
        "scratch": folder / "trl",
        "dtype": "float32",
        "rows": given.rows,
        "prompt-tokens": pair.prompt_tokens,
        "new-tokens": 48,
        "lr": given.learning_rate,
        "beta2": BETAS[1],
        "seed": seed,
    }
    peer = [
        peer_python(given.peers, "trl"),
        HERE / "worker_trl.py",
        *(w for k, v in flags.items() for w in (f"--{k}", v)),
        "--eos",
    ]
    workers = {name: fit_worker(given, config, "--seed_everything", seed) for name, config in configs.items()}
    workers["gkd"] = Worker("gkd", peer)
    seconds = dict.fromkeys(workers, 0.0)
    saved: dict[str, list[tuple[int, float, Path]]] = {name: [(0, 0.0, pair.student)] for name in workers}
    sides = {
        name: lambda worker=worker, matmul=name.partition("@")[2] or "highest": worker.ask("step", matmul=matmul)
        for name, worker in workers.items()
    }
    try:
        for step in range(given.every, given.steps + 1, given.every):
            taken = alternate(sides, given.every, 0, list(workers.values()))
            for name, worker in workers.items():
                lasted = [s.seconds for s in taken[name]]
                if step == given.every:
                    say(f"  {name}: the first step took {lasted[0]:.3f} s")
                    lasted[0] = statistics.median(lasted[1:] or lasted)
                seconds[name] += sum(lasted)
                target = folder / f"{name}-{step:04d}"
                worker.ask("save", folder=str(target))
                saved[name].append((step, seconds[name], target))
    finally:
        for worker in workers.values():
            worker.close()
    return saved


def crossing(curve: Sequence[Mapping[str, float]], key: str, target: float) -> float:
    """Where the curve first reaches the target, between its points on a logarithmic scale of the KL; NaN if never."""
    for before, after in pairwise(curve):
        if after["kl"] <= target:
            if before["kl"] <= target:
                return before[key]
            share = math.log(before["kl"] / target) / math.log(before["kl"] / after["kl"])
            return before[key] + share * (after[key] - before[key])
    return math.nan


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Steps, mean seconds and geometric mean of the KL, over seeds."""
    return [
        {
            "step": points[0]["step"],
            "seconds": statistics.fmean(p["seconds"] for p in points),
            "kl": statistics.geometric_mean(p["kl"] for p in points),
        }
        for points in zip(*curves, strict=True)
    ]


def against(curves: Mapping[int, Any], side: str, peer: str, target: float) -> dict[str, float]:
    """How much less of everything one side needs than its peer."""

    def times_less(key: str, own: Sequence[Any], theirs: Sequence[Any]) -> float:
        return crossing(theirs, key, target) / crossing(own, key, target)

    own, theirs = (mean_curve([c[name] for c in curves.values()]) for name in (side, peer))
    return {
        "times_less": round(times_less("seconds", own, theirs), 4),
        "steps_less": round(times_less("step", own, theirs), 4),
        "seconds_per_step": round(theirs[-1]["seconds"] / own[-1]["seconds"], 4),
        "median_of_seeds": round(statistics.median(times_less("seconds", c[side], c[peer]) for c in curves.values()), 4),
    }


def page(curves: Mapping[int, Any], ratios: Mapping[str, Any], target: float) -> str:
    """The Markdown."""
    steps = [p["step"] for p in next(iter(curves.values()))["ours"]]
    rows = []
    for i, step in enumerate(steps):
        values = {name: [c[name][i]["kl"] for c in curves.values()] for name in SIDES}
        spread = {n: statistics.stdev(v) if len(v) > 1 else math.nan for n, v in values.items()}
        rows.append([step, *(x for n in SIDES for x in (statistics.fmean(values[n]), spread[n]))])
    head = ["step", *(f"{n} {what}" for n in SIDES for what in ("KL", "± (seeds)"))]
    seeds = [[seed, *(crossing(c[n], k, target) for k in ("step", "seconds") for n in SIDES)] for seed, c in curves.items()]
    crossed = table(["seed", *(f"{n} {k}" for k in ("steps", "seconds") for n in SIDES)], seeds)
    told = "\n".join(
        f"Time to {target:g} nats per token, theirs over {name}: **{found['times_less']}** on the mean curves "
        f"({found['steps_less']} in steps, {found['seconds_per_step']} in seconds per step); median of the seeds' own "
        f"{found['median_of_seeds']}.\n"
        for name, found in ratios.items()
        if isinstance(found, Mapping)
    )
    return f"{told}\n\n## To the target\n\n{crossed}\n\n## Curves\n\n{table(head, rows)}"


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=1)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--every", type=int, default=10, help="steps between two saved students")
    made.add_argument("--rows", type=int, default=64, help="completions of a step")
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--target", type=float, default=0.03, help="nats per token")
    made.add_argument("--held-out", type=int, default=256, help="prompts of the measurement")
    given = made.parse_args()
    if given.quick:
        given.seeds, given.steps, given.every, given.rows, given.held_out, given.target = [0], 4, 2, 8, 16, 0.2
    pair = data()
    teacher: Any = load_model(str(pair.teacher)).eval()
    curves: dict[int, dict[str, Any]] = {}
    for seed in given.seeds:
        say(f"seed {seed}:")
        folder = BUILD / "to_target" / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        curves[seed] = {}
        for name, students in train(given, pair, seed, folder).items():
            curves[seed][name] = [
                {"step": s, "seconds": t, "kl": held_out_kl(where, teacher, given.held_out)} for s, t, where in students
            ]
            shown = ", ".join(f"{point['kl']:.4f}" for point in curves[seed][name])
            say(f"  {name}: KL {shown}")
    ratios: dict[str, Any] = {n: against(curves, n, "gkd", given.target) for n in SIDES if n != "gkd"}
    ratios |= {"target": given.target, "seeds": len(curves)}
    report(given, "to_target", ratios, {"curves": curves}, page(curves, ratios, given.target))


if __name__ == "__main__":
    main()
