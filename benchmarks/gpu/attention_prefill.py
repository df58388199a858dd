"""Prefill attention on a GPU: checks every configuration, then times it at the shapes of real models.

Run from the repository root with PYTHONPATH=engine:kernels:client:tests. Each group of configurations is checked in a
process of its own with a time limit, since a wrong barrier hangs a kernel; groups that fail are not timed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from charonia_kernels.gpu._launch import INTERPRETED, traits
from charonia_kernels.gpu.attention_prefill import (
    PrefillConfig,
    prefill_attention,
    prefill_config,
    prefill_tile_tokens,
)
from charonia_kernels.reference.paged_attention import paged_attention

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda")
DTYPE = (
    torch.float16 if INTERPRETED else torch.bfloat16
)  # Triton 3.6's interpreter cannot multiply bf16 matrices
MODELS = {"llama8b": (32, 8, 128), "qwen06b": (16, 8, 128)}
GROUPS = {
    "portable": [
        PrefillConfig("portable", 128, 128, 8, 2),
        PrefillConfig("portable", 128, 64, 8, 2),
        PrefillConfig("portable", 128, 64, 8, 3),
        PrefillConfig("portable", 128, 128, 4, 2),
        PrefillConfig("portable", 64, 128, 4, 2),
        PrefillConfig("portable", 64, 64, 4, 2),
        PrefillConfig("portable", 64, 64, 4, 3),
    ],
    "hopper": [
        PrefillConfig("hopper", 128, 128, 4, 2),
        PrefillConfig("hopper", 128, 128, 4, 3),
        PrefillConfig("hopper", 128, 64, 4, 3),
        PrefillConfig("hopper", 128, 64, 4, 4),
    ],
    "ping-pong": [
        PrefillConfig("hopper", 128, 128, 4, 2, ping_pong=True),
        PrefillConfig("hopper", 128, 128, 4, 3, ping_pong=True),
        PrefillConfig("hopper", 128, 64, 4, 4, ping_pong=True),
    ],
}


@dataclass(frozen=True)
class Shape:
    """sequences: (query tokens, keys) of each."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sequences: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        """Of the products that the causal mask leaves."""
        pairs = sum(n * keys - n * (n - 1) // 2 for n, keys in self.sequences)
        return 4 * self.head_dim * self.num_heads * pairs


@dataclass(frozen=True)
class Problem:
    """What an attention call reads and writes."""

    shape: Shape
    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    table: torch.Tensor
    items: torch.Tensor
    out: torch.Tensor

    def run(self, config: PrefillConfig, window: int | None = None, soft_cap: float | None = None) -> None:
        """One launch."""
        prefill_attention(
            self.q, self.key_cache, self.value_cache, self.table, self.items, self.out, self.shape.head_dim**-0.5,
            window, soft_cap, config=config,
        )  # fmt: skip


def build(shape: Shape, dtype: torch.dtype = DTYPE, *, poison: bool = False) -> Problem:
    """Shuffled blocks, queries that are part of a wider matrix; NaN in slots past the end if `poison`."""
    blocks = [-(-keys // shape.block_size) for _, keys in shape.sequences]
    total = sum(blocks) + 1
    size = (total, shape.num_kv_heads, shape.block_size, shape.head_dim)
    key_cache, value_cache = (
        torch.randn(size, dtype=torch.float32, device=DEVICE).to(dtype) for _ in range(2)
    )
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    order = (torch.randperm(total - 1) + 1).to(torch.int32)
    used = 0
    for row, (count, (_, keys)) in enumerate(zip(blocks, shape.sequences, strict=True)):
        table[row, :count] = order[used : used + count]
        used += count
        last = int(table[row, count - 1])
        if poison and keys % shape.block_size:
            for cache in (key_cache, value_cache):
                cache[last, :, keys % shape.block_size :] = float("nan")
    if poison:
        key_cache[0], value_cache[0] = float("nan"), float("nan")
    tile = prefill_tile_tokens(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    items, first = [], 0
    for row, (n, keys) in enumerate(shape.sequences):
        items += [
            (row, first + b, min(tile, n - b), keys - n + b) for b in range((n - 1) // tile * tile, -1, -tile)
        ]
        first += n
    wide = torch.randn(first, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, device=DEVICE).to(
        dtype
    )
    q = wide[:, : shape.num_heads]
    out = torch.full((first, shape.num_heads, shape.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    return Problem(
        shape, q, key_cache, value_cache, table.to(DEVICE),
        torch.tensor(items, dtype=torch.int32, device=DEVICE), out,
    )  # fmt: skip


def error(problem: Problem, config: PrefillConfig, window: int | None, soft_cap: float | None) -> float:
    """Largest error against the reference in fp32; infinite for NaN."""
    problem.out.fill_(float("nan"))
    problem.run(config, window, soft_cap)
    counts = torch.tensor([0, *(n for n, _ in problem.shape.sequences)])
    lengths = torch.tensor([keys for _, keys in problem.shape.sequences])
    expected = paged_attention(
        problem.q.float(), problem.key_cache.float(), problem.value_cache.float(), problem.table,
        lengths.to(torch.int32), counts.cumsum(0).to(torch.int32), problem.shape.head_dim**-0.5, window, soft_cap,
    )  # fmt: skip
    return float((problem.out.float() - expected).abs().nan_to_num(nan=float("inf")).max())


def check_group(group: str, tiny: bool) -> bool:
    """Compare each configuration of a group with the reference; prints the verdicts, ends with what is sound."""
    if tiny:
        cases = [(Shape("check", 4, 1, 64, 16, ((40, 70), (5, 5))), None, None)]
    else:
        two = ((1500, 1500), (700, 1003))
        cases = [
            (Shape("g4", 32, 8, 128, 64, two), None, None),
            (Shape("g2, blocks of 16", 16, 8, 128, 16, two), None, None),
            (Shape("g3, blocks of 128", 6, 2, 128, 128, two), None, None),
            (Shape("d64", 16, 8, 64, 64, two), None, None),
            (Shape("d80", 8, 8, 80, 32, two), None, None),
            (Shape("window", 8, 2, 128, 64, two), 300, None),
            (Shape("soft cap", 8, 2, 128, 64, two), None, 5.0),
            (Shape("short", 32, 8, 128, 64, tuple((n, n) for n in range(1, 140, 3))), None, None),
        ]
    problems = [(build(shape, poison=True), window, cap) for shape, window, cap in cases]
    configs = GROUPS[group][: 1 if tiny else None]

    def compile_one(job: tuple[PrefillConfig, Problem, int | None, float | None]) -> None:
        config, problem, window, cap = job
        try:
            if DEVICE.type == "cuda":
                torch.cuda.set_device(0)
            problem.run(config, window, cap)
        except Exception as problem_of_compiler:
            print(f"  {config}: {problem_of_compiler!r}"[:300], flush=True)

    # Windows and caps are compiled for the first configuration only.
    jobs = [
        (config, *case)
        for index, config in enumerate(configs)
        for case in problems
        if index == 0
        or (case[1] is None and case[2] is None and case[0].shape.name.startswith(("g", "short")))
    ]
    with ThreadPoolExecutor(1 if tiny else 8) as pool:
        list(pool.map(compile_one, jobs))
    sound = {str(config) for config in configs}
    for config, problem, window, cap in jobs:
        try:
            worst = error(problem, config, window, cap)
        except Exception as failure:
            print(f"  {config}: {failure!r}"[:300], flush=True)
            worst = float("inf")
        if not worst < 0.04:
            sound.discard(str(config))
        if not worst < 0.04 or config == configs[0]:
            print(f"  {group} {problem.shape.name}: largest error {worst:.2e} {config}", flush=True)
    print("SOUND " + json.dumps(sorted(sound)), flush=True)
    return len(sound) == len(configs)


def sound_configs(limit_s: float) -> list[PrefillConfig]:
    """Check all groups side by side, each in a process that is ended if it hangs."""
    running = {
        group: subprocess.Popen(
            [sys.executable, __file__, "--check", group],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for group in GROUPS
    }
    deadline = time.monotonic() + limit_s
    sound: list[PrefillConfig] = []
    for group, process in running.items():
        try:
            text, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            text += f"\n  {group}: HANGS, killed after {limit_s} s"
        lines = text.splitlines()
        print(f"check of {group}:", *[line for line in lines if not line.startswith("SOUND")][-25:], sep="\n")
        names = [json.loads(line[6:]) for line in lines if line.startswith("SOUND ")]
        sound += [config for config in GROUPS[group] if names and str(config) in names[0]]
    return sound


def seconds(function: Callable[[], object], flops: int) -> float:
    """Median time of a call, launched many times from a graph."""
    if DEVICE.type != "cuda":
        function()
        return 1.0
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
        stream.synchronize()
    repeats = max(2, min(50, int(3e-3 / (flops / 500e12 + 5e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            function()
    graph.replay()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / repeats)
    return median(times)


def torch_seconds(shape: Shape) -> tuple[str, float] | None:
    """The best of torch's backends on contiguous tensors of the same shape, with keys repeated for each head."""
    n, keys = shape.sequences[0]
    if n != keys or len(set(shape.sequences)) != 1 or DEVICE.type != "cuda":
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (len(shape.sequences), shape.num_heads, n, shape.head_dim)
    q, k, v = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    best: tuple[str, float] | None = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel([backend]):
                spent = seconds(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
                    shape.flops,
                )
            best = min(best or (backend.name, spent), (backend.name, spent), key=lambda pair: pair[1])
        except Exception as failure:
            print(f"  torch {backend}: {failure!r}"[:200])
    return best


def shapes(tiny: bool) -> list[Shape]:
    """What is timed."""
    if tiny:
        return [Shape("tiny 20", 4, 2, 64, 16, ((20, 20),)), Shape("tiny chunk", 4, 2, 64, 16, ((20, 50),))]
    result = []
    for model, (heads, kv_heads, dim) in MODELS.items():
        lengths = (512, 1024, 2048, 4096, 8192, 16384) if model == "llama8b" else (1024, 4096, 8192)
        result += [Shape(f"{model} {n}", heads, kv_heads, dim, 64, ((n, n),)) for n in lengths]
        result.append(Shape(f"{model} 64x128", heads, kv_heads, dim, 64, ((128, 128),) * 64))
        result.append(Shape(f"{model} 8x1024", heads, kv_heads, dim, 64, ((1024, 1024),) * 8))
        result.append(Shape(f"{model} 2048 at 14336", heads, kv_heads, dim, 64, ((2048, 16384),)))
    result += [
        Shape(f"llama8b 4096, blocks of {size}", 32, 8, 128, size, ((4096, 4096),)) for size in (16, 32, 128)
    ]
    return result


def compile_all(configs: list[PrefillConfig], wanted: list[Shape]) -> None:
    """Compile in parallel what the timed launches need; failures show again where they are timed."""
    kinds = {(s.num_heads, s.num_kv_heads, s.head_dim, s.block_size) for s in wanted}
    problems = [build(Shape("compile", *kind, ((64, 64),))) for kind in sorted(kinds)]

    def compile_one(job: tuple[PrefillConfig, Problem]) -> None:
        with suppress(Exception):
            if DEVICE.type == "cuda":
                torch.cuda.set_device(0)
            job[1].run(job[0])

    with ThreadPoolExecutor(1 if INTERPRETED else 12) as pool:
        list(pool.map(compile_one, [(config, problem) for config in configs for problem in problems]))


def main() -> None:
    """Check, compile, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    parser.add_argument("--check", choices=sorted(GROUPS), help="only check this group, in this process")
    parser.add_argument("--check-limit", type=float, default=100.0, help="seconds after which a check hangs")
    parser.add_argument("--skip-check", action="store_true", help="time all configurations")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.check:
        sys.exit(0 if check_group(arguments.check, arguments.dry_run) else 1)
    if arguments.dry_run:
        check_group("portable", True)
        configs = GROUPS["portable"][:2]
    elif arguments.skip_check:
        configs = [config for group in GROUPS.values() for config in group]
    else:
        configs = sound_configs(arguments.check_limit)
    print("device", torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter", traits(DEVICE))
    print("heuristic", prefill_config(128, 64, torch.bfloat16, torch.bfloat16, traits(DEVICE)))
    rows, wanted = [], shapes(arguments.dry_run)
    started = time.monotonic()
    compile_all(configs, wanted)
    print(f"compiled in {time.monotonic() - started:.1f} s", flush=True)
    for shape in wanted:
        problem = build(shape)
        found = []
        for config in configs:
            if "blocks" in shape.name and config.block_n == 64:
                continue
            try:
                spent = seconds(lambda config=config, problem=problem: problem.run(config), shape.flops)
            except Exception as failure:
                print(f"  {shape.name} {config}: {failure!r}"[:300])
                continue
            found.append((spent, config))
            rows.append({"shape": shape.name, "seconds": spent, "flops": shape.flops, **asdict(config)})
        peer = torch_seconds(shape)
        if peer is not None:
            rows.append({"shape": shape.name, "seconds": peer[1], "flops": shape.flops, "variant": peer[0]})
        line = f"{shape.name:28}"
        for variant in ("portable", "hopper"):
            best = min(
                (pair for pair in found if pair[1].variant == variant), default=None, key=lambda p: p[0]
            )
            if best:
                spent, config = best
                tag = f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.stages}"
                tag += " pp" if config.ping_pong else ""
                line += f" | {variant} {spent * 1e3:7.3f} ms {shape.flops / spent / 1e12:4.0f} TF ({tag:18})"
        if peer is not None:
            line += f" | {peer[0][:5]} {shape.flops / peer[1] / 1e12:4.0f} TF"
        print(line, flush=True)
        del problem
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
