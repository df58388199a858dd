"""Which kernels a decode step's time goes to.

    python benchmarks/gpu/kernel_times.py qwen06b --rows 1 64 --context 128

Prints, for each number of rows, the kernels of steps of that many rows by time: microseconds and launches a step.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from charonia import LLM, SamplingParams
from workloads import MODELS

STEPS = 24


def profile(llm: LLM, rows: int, context: int, limit: int) -> None:
    """One number of rows."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    prompts = [[10 + (row * 7919 + i * 31) % 90000 for i in range(context)] for row in range(rows)]
    llm.generate([prompt[::-1] for prompt in prompts], params, use_tqdm=False)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
    wall = time.perf_counter() - start
    events = sorted(
        (e for e in profiler.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start
    )
    # The second half of the call: decode steps alone.
    events = events[len(events) // 2 :]
    steps = max(1, sum("append_tokens" in event.name for event in events))
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    for event in events:
        total[event.name] += event.time_range.elapsed_us()
        count[event.name] += 1
    span = (events[-1].time_range.end - events[0].time_range.start) / steps
    busy = sum(total.values()) / steps
    print(
        f"rows {rows}: {span:.0f} us a step from start to start, kernels sum up to {busy:.0f} us, {wall:.2f} s in all"
    )
    for name in sorted(total, key=lambda name: -total[name])[:limit]:
        each = total[name] / count[name]
        print(f"  {total[name] / steps:9.1f} us {count[name] / steps:7.1f} x {each:8.2f} us  {name[:90]}")


def main() -> None:
    """Profile each number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--limit", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(MODELS[args.model]))
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "max_model_len": 4096,
        }
        with LLM(directory, max_num_seqs=512, **settings) as llm:
            for rows in args.rows:
                profile(llm, rows, args.context, args.limit)


if __name__ == "__main__":
    main()
