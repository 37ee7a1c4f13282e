"""The step against TRL on an NVIDIA GPU, with random-weight Qwen3-shaped models.

Teacher and student have the published shapes of Qwen3 (vocabulary 151 936), bfloat16. Beside the ratios: the loss matmuls as
a share of the matmul peak measured in the same run, the rollout as a share of the measured copy bandwidth (the least that
decoding must read: the student's weights once a token, and the cache), and peak memory of every side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from harness import (
    BUILD,
    Worker,
    alternate,
    chosen,
    fit_worker,
    parser,
    peer_python,
    ratio,
    report,
    say,
    summary,
    table,
    trl_worker,
)
from opd_lightning.models.loading import blank_generation, load_config
from pairs import Pair, fit_config, word_tokenizer, write_prompts

VOCAB = 151_936
SHAPES = {  # layers, width, heads, key-value heads, feed-forward width, tied head; from the models' published configurations
    "8B": (36, 4096, 32, 8, 12288, False),
    "4B": (36, 2560, 32, 8, 9728, True),
    "1.7B": (28, 2048, 16, 8, 6144, True),
    "0.6B": (28, 1024, 16, 8, 3072, True),
    "toy-teacher": (3, 96, 6, 2, 192, True),
    "toy": (2, 64, 4, 2, 128, True),
}
PHASES = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "other")
PEERS = ("gkd", "distillation")


def save(name: str, vocab: int, device: str) -> Path:
    """The folder of a random model of a shape, made once."""
    home = BUILD / "models" / f"qwen3-{name}-{vocab}"
    if (home / "done").is_file():
        return home
    say(f"  making {home}")
    layers, width, heads, kv, inner, tied = SHAPES[name]
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=16 if name.startswith("toy") else 128,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    plain: Any = blank_generation(model)
    plain.save_pretrained(home)
    word_tokenizer(vocab).save_pretrained(home)
    (home / "done").touch()
    return home


def median_of(work: Callable[[], Any], device: str, times: int = 20) -> float:
    """Median seconds of one call."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    taken = []
    for _ in range(times + 3):
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


def peaks(device: str, size: int) -> dict[str, float]:
    """Measured FLOP/s of a bfloat16 matrix product and bytes per second of a copy (read and written)."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_of(lambda: a @ b, device)
    return {"matmul_flops": flops, "copy_bytes": 2 * source.numel() / median_of(lambda: target.copy_(source), device)}


def start(given: argparse.Namespace, pair: Pair, device: str, peers: list[str]) -> dict[str, Worker]:
    """One process a side."""
    scratch = BUILD / "gpu"
    config = fit_config(scratch / "ours.yaml", pair, "bfloat16", given.rows, given.new_tokens)
    workers = {"ours": fit_worker(given, config)}
    for name in peers:
        python = given.trl_python or peer_python(given.peers, "trl")
        workers[name] = trl_worker(given, name, python, scratch, pair, device=device)
    return workers


def shares(given: argparse.Namespace, pair: Pair, side: dict[str, Any], peak: dict[str, float]) -> dict[str, float]:
    """What of the machine the loss and the rollout reach.

    The loss needs four products of tokens x width x vocabulary: both heads, and the student's two gradients. Decoding reads the
    student's weights once a step, and keys and values of all earlier tokens.
    """
    ours, theirs = (load_config(str(f)) for f in (pair.student, pair.teacher))
    tokens = given.rows * given.new_tokens
    flops = 2.0 * tokens * ours.vocab_size * (3 * ours.hidden_size + theirs.hidden_size)
    weights = sum(f.stat().st_size for f in pair.student.glob("*.safetensors"))
    cache = 2 * 2 * ours.num_hidden_layers * ours.num_key_value_heads * ours.head_dim * given.rows
    read = sum(weights + cache * (given.prompt_tokens + t) for t in range(given.new_tokens))
    phases = side["phases"]
    return {
        "loss_of_peak": round(flops / phases["loss"] / peak["matmul_flops"], 4),
        "rollout_of_copy_bandwidth": round(read / phases["rollout"] / peak["copy_bytes"], 4),
    }


def main() -> None:
    """The command."""
    made = parser(__doc__ or "", rounds=5)
    made.add_argument("--teacher", choices=list(SHAPES), default="8B")
    made.add_argument("--student", choices=list(SHAPES), default="1.7B")
    made.add_argument("--rows", type=int, default=32)
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--new-tokens", type=int, default=256)
    made.add_argument("--trl-python", type=Path, help="interpreter that has TRL, instead of the one in --peers")
    made.add_argument(
        "--rehearse", action="store_true", help="the same with a toy pair on the CPU, to see that the script runs"
    )
    given = made.parse_args()
    if not torch.cuda.is_available() and not given.rehearse:
        raise SystemExit("gpu.py needs an NVIDIA GPU, and torch sees none here (to try the script itself: --rehearse)")
    device, vocab, size = "cuda", VOCAB, 8192
    peers = chosen(given, list(PEERS))
    if given.rehearse:
        device, vocab, size, given.quick, given.teacher, given.student = "cpu", 1024, 256, True, "toy-teacher", "toy"
    if given.quick:
        given.rows, given.new_tokens, given.rounds = 2, 16, min(given.rounds, 2)
    pair = Pair(save(given.student, vocab, device), save(given.teacher, vocab, device), BUILD / "gpu" / "prompts.jsonl", 64)
    pair.prompts.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(pair.student, pair.prompts, max(64, given.rows), given.prompt_tokens)
    peak = peaks(device, size)
    say(f"peaks: {json.dumps({k: f'{v:.3g}' for k, v in peak.items()})}")
    workers = start(given, pair, device, peers)
    try:
        sides = {name: lambda worker=worker: worker.ask("step") for name, worker in workers.items()}
        taken = alternate(sides, given.rounds, max(given.warmup, 1), list(workers.values()))
        for name in peers:
            workers[name].close()  # the float64 copies of the check need the room
        agreed = workers["ours"].ask("check", rows=1)
    finally:
        for worker in workers.values():
            worker.close()
    say(f"relative error of our loss {agreed['loss_error']:.1e}, of our gradient {agreed['gradient_error']:.1e}")
    if not max(agreed.values()) <= 1e-5:
        raise SystemExit("loss or gradient differs from the naive one by more than 1e-5: no timing counts")
    found = {name: summary(samples) for name, samples in taken.items()}
    memory = {name: taken[name][-1].extra.get("peak_gpu", 0) / 2**30 for name in taken}
    ratios: dict[str, Any] = {f"vs_{p}": ratio(found["ours"], found[p]) for p in peers}
    if device == "cuda":
        ratios["peak_memory"] = round(memory["ours"] / min(memory[p] for p in peers), 4)
    ratios |= shares(given, pair, found["ours"], peak)
    rows = [[n, f["median"], *(f["phases"].get(p, 0.0) for p in PHASES), memory[n]] for n, f in found.items()]
    lines = "\n".join(f"- {k}: {v}" for k, v in ratios.items())
    text = f"{given.teacher} → {given.student}, {given.rows} rows of {given.prompt_tokens} + {given.new_tokens} tokens.\n\n"
    text += table(["side", "step (s)", *PHASES, "peak memory (GiB)"], rows) + f"\n\n{lines}"
    record = {"sides": found, "peaks": peak, "memory_gib": memory, "agreement": agreed}
    report(given, "gpu", ratios, record, text)


if __name__ == "__main__":
    main()
