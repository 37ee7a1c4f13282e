"""The README's table of speed and memory, made from benchmarks/results/*.json.

python benchmarks/table.py             # print it
python benchmarks/table.py --write     # put it between the two markers of README.md
python benchmarks/table.py --check     # exit code 1 if README.md holds another one
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, described, table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
Row = tuple[str, str, str]
"""What is measured, against what, the figure."""


def times(share: float | None) -> str:
    """``2.5 × faster`` for ours taking 0.4 of their time."""
    return faster(1.0 / share) if share else "not reached"


def faster(speed: float) -> str:
    """Our speed over theirs, in words."""
    return f"{speed:.2g} × faster" if speed >= 1.0 else f"{1.0 / speed:.2g} × slower"


def vs_trl(ratios: Mapping[str, Any]) -> Iterator[Row]:
    names = {"bf16": "SmolLM2 pair, bf16", "fp32": "SmolLM2 pair, fp32", "tiny": "tiny pair, fp32"}
    for case, found in ratios.items():
        for key, peer in (("vs_gkd", "TRL GKDTrainer"), ("vs_distillation", "TRL DistillationTrainer")):
            yield f"whole optimizer step, {names[case]}", peer, times(found[key])
        yield f"peak memory of it, {names[case]}", "the smaller of both", f"{found['peak_rss']:.2f} of theirs"


def vs_vllm(ratios: Mapping[str, Any]) -> Iterator[Row]:
    names = {"vs_hf": "transformers generate", "vs_vllm": "vLLM on the CPU"}
    for case, found in ratios.items():
        if case == "exponent":
            yield "rollout seconds over new tokens", "exponent of transformers generate", f"{found['ours']} / {found['hf']}"
            continue
        for key, value in found.items():
            yield f"rollout, batch {case.removeprefix('batch_')}", names[key], faster(value)


def loss(ratios: Mapping[str, Any]) -> Iterator[Row]:
    names = {"naive": "whole logits", "trl": "TRL's chunked kernel", "liger": "Liger's fused loss"}
    for case, found in ratios.items():
        if isinstance(found, Mapping):
            size = case.removesuffix("-frozen") + (" (frozen head)" if case.endswith("-frozen") else "")
            for key, value in found.items():
                yield f"loss, {size}", names[key.removeprefix("faster_than_")], faster(value)
        elif case.startswith("share_of_naive_"):
            size = case.removeprefix("share_of_naive_").replace("_frozen", " (frozen head)")
            yield f"loss memory, vocabulary {size}", "whole logits", f"{100 * found:.0f} % of theirs"


def prefix(ratios: Mapping[str, Any]) -> Iterator[Row]:
    for who in ("teacher", "student"):
        if who in ratios:
            yield f"{who}, 8 rollouts of one 512-token prompt", "padded forward", f"{ratios[who]:.2g} × faster"


def to_target(ratios: Mapping[str, Any]) -> Iterator[Row]:
    what = f"time to a held-out KL of {ratios['target']:g}, addition pair"
    for side, setting in (("ours", ""), ("ours@medium", ", ours with `float32_matmul: medium`")):
        less = ratios[side]["times_less"]
        yield what + setting, "TRL GKDTrainer", f"{less:.2g} × less" if less else "not reached by both"


def monitors(ratios: Mapping[str, Any]) -> Iterator[Row]:
    for pair, value in ratios.items():
        yield f"step with all monitors, {pair} pair", "the same without", f"{value:.2f} × its time"


def natural_lengths(ratios: Mapping[str, Any]) -> Iterator[Row]:
    for case, found in ratios.items():
        yield f"natural lengths, {case}", "equal lengths", f"{found['gain']:.2g} × faster (ideal {found['ideal']:.2g})"


def gpu(ratios: Mapping[str, Any]) -> Iterator[Row]:
    for key, peer in (("vs_gkd", "TRL GKDTrainer"), ("vs_distillation", "TRL DistillationTrainer")):
        if key in ratios:
            yield "whole optimizer step, GPU", peer, times(ratios[key])


READERS = {f.__name__: f for f in (vs_trl, vs_vllm, loss, prefix, to_target, natural_lengths, monitors, gpu)}


def rendered(folder: Path) -> str:
    """The table and one line a machine.

    Raises:
        SystemExit: if there are no results.
    """
    rows: list[Row] = []
    machines: dict[str, list[str]] = {}
    for name, read in READERS.items():
        file = folder / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            rows += read(found["ratios"])
            machines.setdefault(described(found["machine"]), []).append(name)
    if not rows:
        raise SystemExit(f"no results in {folder}: run the benchmarks first")
    told = "\n".join(f"{', '.join(names)}: {machine}" for machine, names in machines.items())
    return f"{table(['what', 'against', 'ours'], rows)}\n\n{told}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    parser.add_argument("--check", action="store_true", help="exit code 1 if README.md holds another one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    text = rendered(given.results)
    if not given.write and not given.check:
        print(text)
        return
    page = given.readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{given.readme} must hold the markers {BEGIN} and {END}, once each")
    head, _, rest = page.partition(BEGIN)
    new = f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
    if given.write:
        given.readme.write_text(new, encoding="utf-8")
    elif new != page:
        raise SystemExit("the README's benchmark table is not that of the results: python benchmarks/table.py --write")


if __name__ == "__main__":
    main()
