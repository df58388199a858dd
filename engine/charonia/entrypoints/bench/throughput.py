"""`charonia bench throughput`: many requests at once, in this process."""

import argparse
import random
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
        "--num-prompts", type=positive_int, default=256, metavar="N", help="(default %(default)s)"
    )
    add_length_flags(parser, input_len=512, output_len=128)


def measure(model: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one batch, after a small one to warm up."""
    count, input_len, output_len = options.num_prompts, options.input_len, options.output_len
    rng, size = random.Random(0), vocab_size(model)
    start = time.perf_counter()
    with LLM(model, **settings) as llm:
        startup = time.perf_counter() - start
        llm.generate(random_prompts(rng, 4, 16, size), exactly(8), use_tqdm=False)
        prompts = random_prompts(rng, count, input_len, size)
        start = time.perf_counter()
        llm.generate(prompts, exactly(output_len))
        seconds = time.perf_counter() - start
    figures = {
        "startup_s": startup,
        "elapsed_s": seconds,
        "num_requests": count,
        "input_len": input_len,
        "output_len": output_len,
        "requests_per_second": count / seconds,
        "output_tokens_per_second": count * output_len / seconds,
        "tokens_per_second": count * (input_len + output_len) / seconds,
    }
    print(f"{count} requests of {input_len} + {output_len} tokens in {seconds:.2f} s")
    print(
        f"{figures['requests_per_second']:.2f} requests/s, {figures['output_tokens_per_second']:.1f} output tokens/s, "
        f"{figures['tokens_per_second']:.1f} tokens/s in all"
    )
    return figures
