"""Where a workload's time goes: its steps by class, and what kernels run in them.

    python benchmarks/gpu/steps.py llama8b chat-1000 --kernels

A class is what the steps do (decodes alone, or chunks too) and their padded number of tokens. With `--kernels` the
workload runs a second time under the profiler; a kernel is charged what passes from the end of the one before it to
its own end, so that overlapping kernels count once and waiting is seen as `idle` (gaps of more than 5 us).
"""

import argparse
import bisect
import collections
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from charonia import LLM
from charonia.core.step import StepPlan
from charonia.worker.cuda_graphs import decode_sizes, mixed_sizes
from charonia.worker.model_runner import ModelRunner
from charonia.worker.results import DeviceStep
from workloads import MODELS, SUITES, TINY, Item

from engine import engine_settings, generate, items_of

IDLE_US = 5.0
KINDS = {
    "decode attention": r"decode|cascade",
    "prefill attention": r"prefill",
    "matrix products": r"gemm|nvjet|cutlass|hopper_kernel|skinny_kernel|vector_kernel|splitK|sm90_",
    "norm": r"norm_kernel|rms",
    "rope": r"rope",
    "SiLU, GELU": r"gated",
    "sampling": r"sampl|filter|append|penalt|rule|logprob",
    "rows, plan": r"prepare|plan|scatter|gather|embed|Memcpy|Memset",
}
"""Kind -> what the names of its kernels match; the first that fits."""


@dataclasses.dataclass(slots=True)
class Step:
    """What is known of a step: entries, flat tokens, whether it holds decodes alone, and times in seconds."""

    entries: int
    tokens: int
    decodes_only: bool
    launch_s: float
    device_s: float = 0.0
    start: float = 0.0


class Recorder:
    """Notes every step of every runner of this process."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._pending: dict[int, Step] = {}
        execute, wait = ModelRunner.execute, DeviceStep.wait

        def recorded_execute(runner: ModelRunner, plan: StepPlan) -> DeviceStep:
            start = time.perf_counter()
            step = execute(runner, plan)
            layout = step.layout
            seen = Step(
                layout.num_entries, layout.num_tokens, layout.decodes_only, time.perf_counter() - start
            )
            seen.start = start
            self.steps.append(seen)
            self._pending[step.step_id] = seen
            return step

        def recorded_wait(step: DeviceStep) -> Any:
            result = wait(step)
            self._pending.pop(step.step_id).device_s = result.device_seconds or 0.0
            return result

        ModelRunner.execute = recorded_execute  # type: ignore[method-assign]
        DeviceStep.wait = recorded_wait  # type: ignore[method-assign]


def print_classes(steps: list[Step], max_num_seqs: int, max_num_tokens: int) -> None:
    """Steps by class: how many, mean entries and tokens, device time each and in all."""
    classes: dict[tuple[str, int], list[Step]] = collections.defaultdict(list)
    sizes = {True: decode_sizes(max_num_seqs), False: mixed_sizes(max_num_tokens)}
    for step in steps:
        padded = sizes[step.decodes_only][bisect.bisect_left(sizes[step.decodes_only], step.tokens)]
        classes["decodes" if step.decodes_only else "chunks", padded].append(step)
    for (kind, size), members in sorted(classes.items()):
        count = len(members)
        device = sum(step.device_s for step in members)
        print(
            f"  {kind:8}{size:6}  {count:5} steps  entries {sum(s.entries for s in members) / count:6.1f}"
            f"  tokens {sum(s.tokens for s in members) / count:7.1f}  device {1e3 * device / count:8.3f} ms"
            f"  {device:7.3f} s  launch {1e3 * sum(s.launch_s for s in members) / count:6.2f} ms"
        )


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def print_kernels(events: list[tuple[str, float, float]], limit: int) -> None:
    """Time by kind and by kernel. events: name, begin and end in us, by begin."""
    time_of: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    idle = 0.0
    previous = events[0][1]
    for name, begin, end in events:
        if begin > previous + IDLE_US:
            idle += begin - previous
            previous = begin
        time_of[name] += max(0.0, end - previous)
        count[name] += 1
        previous = max(previous, end)
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, spent in time_of.items():
        kinds[kind_of(name)] += spent
    total = sum(kinds.values()) + idle
    for kind, spent in [*sorted(kinds.items(), key=lambda pair: -pair[1]), ("idle", idle)]:
        print(f"  {kind:20}{spent / 1e6:8.3f} s {100 * spent / total:5.1f}%")
    for name in sorted(time_of, key=lambda name: -time_of[name])[:limit]:
        spent, calls = time_of[name], count[name]
        print(f"    {spent / 1e6:8.3f} s {calls:7} x {spent / calls:9.2f} us  {kind_of(name):18} {name[:80]}")


def profile(llm: LLM, items: list[Item], limit: int) -> None:
    """The workload once more, under the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = generate(llm, items)
        torch.cuda.synchronize()
    # The profiler's own list, a million entries long, takes minutes to make.
    events = sorted(
        (event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3, event.name())
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type().name == "CUDA"
    )
    print(f"  under the profiler: {seconds:.3f} s")
    if events:
        print_kernels([(name, begin, end) for begin, end, name in events], limit)


def main() -> None:
    """Run the workloads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("workloads", nargs="+", metavar="LABEL")
    parser.add_argument("--kernels", action="store_true", help="run again under the profiler")
    parser.add_argument("--limit", type=int, default=14, help="kernels to print")
    parser.add_argument("--tiny", action="store_true", help="a toy model, for a trial run")
    options = parser.parse_args()
    options.enforce_eager, options.settings = False, {}
    recorder = Recorder()
    with tempfile.TemporaryDirectory(prefix="charonia-bench-") as directory:
        changes = TINY if options.tiny else {}
        Path(directory, "config.json").write_text(json.dumps(MODELS[options.model] | changes))
        settings = engine_settings(options)
        with LLM(directory, **settings) as llm:
            generate(llm, [([5] * 64, 16)] * 4)
            for workload in SUITES[options.model]:
                if workload.label not in options.workloads:
                    continue
                recorder.steps.clear()
                preemptions = llm.stats().preemptions
                seconds = generate(llm, items_of(workload, 0, options.tiny))
                steps = list(recorder.steps)
                print(
                    f"{options.model} {workload.label}: {seconds:.3f} s, {len(steps)} steps, device"
                    f" {sum(step.device_s for step in steps):.3f} s,"
                    f" {llm.stats().preemptions - preemptions} preemptions",
                    flush=True,
                )
                print_classes(steps, settings["max_num_seqs"], settings.get("max_num_batched_tokens", 8192))
                if options.kernels and torch.cuda.is_available():
                    profile(llm, items_of(workload, 1, options.tiny), options.limit)


if __name__ == "__main__":
    main()
