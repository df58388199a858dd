"""Charonia beside transformers' `generate` on this CPU: same checkpoint, same dtype, same prompts, same token counts.

    python benchmarks/bench_cpu.py                     # everything, bf16; a table, and JSON with --json FILE
    python benchmarks/bench_cpu.py --profile           # where a step's time goes, instead

Each engine runs in a process of its own. Workloads are fixed by seed; end-of-sequence tokens are ignored and decoding
is greedy, so that both generate exactly the tokens that the workload asks for. transformers decodes a batch to its
longest member; tokens beyond a request's own count are not counted. Its figure for the mixed workload is the best of
one padded batch, batches of eight sorted by length, and one request after the other.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Workload = list[tuple[list[int], int]]
"""Prompt token ids and tokens to generate."""


def single(seed: int = 0) -> Workload:
    """One request: 64 prompt tokens, 128 to generate."""
    rng = random.Random(seed)
    return [([rng.randrange(10, 40000) for _ in range(64)], 128)]


def mixed(count: int = 32, seed: int = 1) -> Workload:
    """Prompts of 16 to 256 tokens and 16 to 96 tokens to generate, log-uniform."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    return [([rng.randrange(10, 40000) for _ in range(draw(16, 256))], draw(16, 96)) for _ in range(count)]


def shared_prefix(count: int = 200, prefix: int = 1000, tail: int = 20, seed: int = 2) -> Workload:
    """Prompts that begin with the same 1,000 tokens; one token each to generate."""
    rng = random.Random(seed)
    head = [rng.randrange(10, 40000) for _ in range(prefix)]
    return [(head + [rng.randrange(10, 40000) for _ in range(tail)], 1) for _ in range(count)]


def tokens_of(work: Workload) -> int:
    """Tokens that a workload generates."""
    return sum(count for _, count in work)


def median_time(run: Callable[[], None], repeats: int) -> float:
    """Seconds of the median of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- one engine per process ----


def run_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Time transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()

    def generate(work: Workload, max_time: float | None = None) -> None:
        width = max(len(prompt) for prompt, _ in work)
        ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt, _ in work])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in work])
        steps = max(count for _, count in work)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                pad_token_id=2,
                max_time=max_time,
            )

    def in_groups(size: int, limit: float) -> float:
        """Seconds for the mixed workload in batches of `size`; more than `limit` when it was cut off there."""
        work = sorted(mixed(), key=lambda item: item[1])
        start = time.perf_counter()
        for i in range(0, len(work), size):
            left = limit - (time.perf_counter() - start)
            if left <= 0:
                break
            generate(work[i : i + size], left)
        return time.perf_counter() - start

    generate(single()[:1])
    result = {"single": median_time(lambda: generate(single()), args.repeats)}
    ways: dict[str, float] = {}
    for size in (1, 8, 32):
        # A way that is slower than the best so far is not of interest: it need not end.
        ways[f"batches of {size}"] = in_groups(size, min(ways.values(), default=600.0))
    best = min(ways, key=lambda way: ways[way])
    return {**result, "mixed": ways[best], "mixed_ways": ways, "mixed_best": best}


def run_charonia(args: argparse.Namespace) -> dict[str, Any]:
    """Time `LLM.generate`, and count the prefill work of a shared prefix with and without the cache."""
    from charonia import LLM, SamplingParams

    def params(count: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=True)

    def generate(llm: LLM, work: Workload) -> None:
        llm.generate([prompt for prompt, _ in work], [params(count) for _, count in work], use_tqdm=False)

    settings = {"dtype": args.dtype, "cpu_threads": args.threads}
    with LLM(args.model, enable_prefix_caching=False, **settings) as llm:
        generate(llm, single())
        result: dict[str, Any] = {
            "single": median_time(lambda: generate(llm, single()), args.repeats),
            "mixed": median_time(lambda: generate(llm, mixed()), args.repeats),
        }
    for name, caching in (("cached", True), ("uncached", False)):
        work = shared_prefix(args.prefix_prompts if caching else max(1, args.prefix_prompts // 10))
        with LLM(args.model, enable_prefix_caching=caching, **settings) as llm:
            start = time.perf_counter()
            generate(llm, work)
            result[f"prefix_{name}"] = {
                "prompts": len(work),
                "seconds": time.perf_counter() - start,
                "tokens_computed": llm.stats().scheduled_tokens,
            }
    return result


def profile_steps(args: argparse.Namespace) -> None:
    """Print where the time of decode steps goes, by operator, at 1 and 32 rows."""
    import cProfile
    import pstats

    from charonia import LLM, SamplingParams
    from charonia.worker.executor import InProcessExecutor

    profiler = cProfile.Profile()
    original = InProcessExecutor._run

    def profiled(self: InProcessExecutor, plan: Any) -> Any:
        profiler.enable()
        try:
            return original(self, plan)
        finally:
            profiler.disable()

    InProcessExecutor._run = profiled  # type: ignore[method-assign]
    with LLM(args.model, dtype=args.dtype, cpu_threads=args.threads) as llm:
        for rows in (1, 32):
            prompts = [[7 + row] * 32 for row in range(rows)]
            llm.generate(
                prompts, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False
            )
            profiler.clear()
            start, before = time.perf_counter(), llm.stats().steps
            llm.generate(
                prompts, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True), use_tqdm=False
            )
            seconds, steps = time.perf_counter() - start, llm.stats().steps - before
            print(f"\n{rows} rows: {seconds / steps * 1e3:.2f} ms a step, {rows * 64 / seconds:.0f} tokens/s")
            pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(14)


# ---- the table ----


def in_process(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine, "--model", args.model, "--dtype", args.dtype,
               "--threads", str(args.threads), "--repeats", str(args.repeats),
               "--prefix-prompts", str(args.prefix_prompts)]  # fmt: skip
    print(f"running {engine} ...", flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run both engines and print them side by side."""
    ours, theirs = in_process("charonia", args), in_process("transformers", args)
    print(f"\n{args.dtype}, {args.threads} threads, {_machine()}\n")
    print(f"{'workload':<28}{'transformers tok/s':>20}{'charonia tok/s':>17}{'ratio':>8}")
    for name, work in (("single", single()), ("mixed", mixed())):
        count = tokens_of(work)
        label = "1 request, 64/128" if name == "single" else f"{len(work)} mixed requests"
        print(
            f"{label:<28}{count / theirs[name]:>20.1f}{count / ours[name]:>17.1f}"
            f"{theirs[name] / ours[name]:>8.2f}"
        )
    print(f"\ntransformers' best way for the mixed workload: {theirs['mixed_best']}")
    for way, seconds in theirs["mixed_ways"].items():
        slower = "" if way == theirs["mixed_best"] else " or fewer"
        print(f"  {way:<16}{tokens_of(mixed()) / seconds:8.1f} tok/s{slower}")
    cached, uncached = ours["prefix_cached"], ours["prefix_uncached"]
    per_cached = cached["tokens_computed"] / cached["prompts"]
    per_uncached = uncached["tokens_computed"] / uncached["prompts"]
    print(
        f"\nshared 1,000-token prefix: {per_cached:.0f} tokens computed a prompt with the cache, {per_uncached:.0f} "
        f"without ({per_uncached / per_cached:.1f}x less work); {cached['seconds'] / cached['prompts'] * 1e3:.0f} ms "
        f"and {uncached['seconds'] / uncached['prompts'] * 1e3:.0f} ms a prompt"
    )
    return {"machine": _machine(), "dtype": args.dtype, "charonia": ours, "transformers": theirs}


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} ({platform.machine()}, {os.cpu_count()} CPUs)"
    return platform.machine()


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory; the embedded default by default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefix-prompts", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="profile decode steps instead of comparing")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--engine", choices=["charonia", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from charonia.entrypoints.default_model import ensure_default_model

        args.model = str(ensure_default_model())
    if args.profile:
        profile_steps(args)
    elif args.engine:
        print(json.dumps(run_charonia(args) if args.engine == "charonia" else run_transformers(args)))
    else:
        result = compare(args)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
