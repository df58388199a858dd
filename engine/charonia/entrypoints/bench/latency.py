"""`charonia bench latency`: how long one small batch takes from beginning to end."""

import argparse
import random
import statistics
import time
from typing import Any

from charonia.entrypoints.bench.prompts import (
    add_length_flags,
    exactly,
    positive_int,
    random_prompts,
    vocab_size,
)
from charonia.entrypoints.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="(default %(default)s)"
    )
    parser.add_argument(
        "--num-iters", type=positive_int, default=10, metavar="N", help="(default %(default)s)"
    )
    parser.add_argument(
        "--num-iters-warmup", type=positive_int, default=2, metavar="N", help="(default %(default)s)"
    )
    add_length_flags(parser, input_len=32, output_len=128)


def measure(model: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run batches of fresh prompts, one after the other."""
    rng, size = random.Random(0), vocab_size(model)
    total, first = [], []
    with LLM(model, **settings) as llm:
        for i in range(options.num_iters_warmup + options.num_iters):
            prompts = random_prompts(rng, options.batch_size, options.input_len, size)
            start = time.perf_counter()
            outputs = llm.generate(prompts, exactly(options.output_len), use_tqdm=False)
            seconds = time.perf_counter() - start
            if i >= options.num_iters_warmup:
                total.append(seconds)
                first.append(statistics.median(output.timings.first_token for output in outputs))
    median = statistics.median(total)
    per_token = (median - statistics.median(first)) / max(1, options.output_len - 1)
    figures = {
        "batch_size": options.batch_size,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "latencies_s": total,
        "median_s": median,
        "mean_s": statistics.fmean(total),
        "max_s": max(total),
        "median_first_token_s": statistics.median(first),
        "time_per_output_token_s": per_token,
    }
    print(f"{options.batch_size} requests of {options.input_len} + {options.output_len} tokens")
    print(f"median {median:.4f} s, mean {figures['mean_s']:.4f} s, longest {figures['max_s']:.4f} s")
    print(
        f"first token after {figures['median_first_token_s'] * 1e3:.2f} ms, then {per_token * 1e3:.3f} ms each"
    )
    return figures
