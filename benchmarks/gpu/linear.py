"""Skinny linear layers: checks, sweeps launch parameters, times all matmuls of a model in one graph.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/linear.py --out linear.json

Every configuration is checked against fp32 before it is timed; a wrong or failing one is reported and passed over.
`--kinds hopper` sweeps that kernel alone against the present choices; a process of its own checks it first, under a
time limit, since a wrong barrier hangs. `--chains-only` takes the configurations from `linear_choice.choose`. The last
lines are ready for its table.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from charonia_kernels.gpu._launch import INTERPRETED, traits
from charonia_kernels.gpu.linear_choice import has_hopper_kernel
from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op, hopper_config, tile_rows
from linear_candidates import DEVICE, MODELS, TINY, Layer, Model, candidates, label, present_choice

if INTERPRETED:  # for --dry-run
    import_module("support.interpreter")
ops: Any = import_module("charonia_kernels.gpu.linear")

EPS = 1e-5
BANDWIDTH = 2.97e12
ROWS = (1, 8, 64, 16, 4, 32, 2, 48, 128, 96)  # what counts most comes first
HOPPER_ROWS = (8, 64, 32, 16, 128, 96)
CHAIN_ROWS = (1, 8, 16, 32, 64)
OPS: tuple[Op, ...] = ("linear", "norm_linear", "norm_linear_silu_mul", "linear_add")


# ------------------------------------------------------------------------------------------------- running an op


@dataclass(frozen=True)
class Inputs:
    """Operands of a layer but its weight: x [m, k], norm_weight [k], residual [m, n]."""

    x: torch.Tensor
    norm_weight: torch.Tensor
    residual: torch.Tensor


def inputs(layer: Layer, m: int, n: int) -> Inputs:
    """Random ones."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    return Inputs(
        torch.randn(m, layer.k, **kind),
        1 + 0.1 * torch.randn(layer.k, **kind),
        torch.randn(m, n, **kind),
    )


def run(op: Op, config: LinearConfig, given: Inputs, weight: torch.Tensor, pdl: bool = True) -> torch.Tensor:
    """The op's result; that of linear_add is the residual."""
    if op == "norm_linear":
        return ops.norm_linear_with(config, given.x, given.norm_weight, EPS, weight, pdl=pdl)
    if op == "norm_linear_silu_mul":
        return ops.norm_linear_silu_mul_with(config, given.x, given.norm_weight, EPS, weight, pdl=pdl)
    if op == "linear_add":
        ops.linear_add_with(config, given.x, weight, given.residual, pdl=pdl)
        return given.residual
    return ops.linear_with(config, given.x, weight, pdl=pdl)


def expected(op: Op, given: Inputs, weight: torch.Tensor) -> torch.Tensor:
    """The op's result in fp32."""
    x = given.x.float()
    if op.startswith("norm"):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * given.norm_weight.float()
    y = torch.cat([x @ part.float().t() for part in weight.split(16384)], 1)
    if op == "norm_linear_silu_mul":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return y + given.residual.float() if op == "linear_add" else y


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error as a whole, and of the worst element, in units of what is allowed: 1 is too much."""
    difference = actual.float() - reference
    whole = float(difference.norm() / reference.norm()) / 0.008
    worst = float((difference.abs() / (0.03 * reference.abs() + 0.06 * reference.std())).max())
    return max(whole, worst) if math.isfinite(whole) and math.isfinite(worst) else math.inf


def graph_seconds(body: Callable[[], object], calls: int, repeats: int = 7) -> float:
    """Median time of one of the calls that body makes, replayed as a CUDA graph."""
    body()
    if DEVICE.type == "cpu":
        return 1.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events)]
    return statistics.median(times) / 1e3 / calls


# ----------------------------------------------------------------------------------------------------- compiling


def compile_one(job: tuple[Layer, int, LinearConfig]) -> str:
    """Run a configuration on few rows of weight, so that its kernel is in the cache on disk; what went wrong, or ''."""
    layer, m, config = job
    n = 256 if layer.n % 16 == 0 else layer.n
    try:
        weight = torch.zeros(n, layer.k, dtype=torch.bfloat16, device=DEVICE)
        run(layer.op, config, inputs(layer, m, n), weight)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return ""


def compile_key(job: tuple[Layer, int, LinearConfig]) -> tuple[Any, ...]:
    """What a kernel is specialised by; needs to be right only as far as equal keys mean the same kernel."""
    layer, m, config = job
    fused = (
        config.fuse_norm and layer.op.startswith("norm"),
        *(layer.op.endswith(x) for x in ("silu_mul", "add")),
    )
    own = replace(config, block_m=tile_rows(config, m), prefetch=0, fuse_norm=False)
    if config.kind == "hopper":
        return own, fused, layer.k
    if config.kind == "vector":
        return own, fused, ops._prefetch_bytes(config, 2 * (layer.k - config.block_k)), layer.k
    whole = layer.k % (config.block_k * config.split_k) == 0
    return own, fused, ops._prefetch_bytes(config, 2 * layer.k // config.split_k) if whole else 0, whole


def compile_all(
    jobs: list[tuple[Layer, int, LinearConfig]], workers: int, limit_s: float
) -> dict[tuple[Any, ...], str]:
    """Compile side by side, in processes of their own. Returns what failed, or has not ended when time is up."""
    unique = {compile_key(job): job for job in jobs if job[2].kind != "cublas"}
    failures: dict[tuple[Any, ...], str] = {}
    if workers == 0:
        return failures
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = {pool.submit(compile_one, job): key for key, job in unique.items()}
    try:
        for future in as_completed(futures, timeout=limit_s):
            try:
                problem = future.result()
            except Exception as broken:
                problem = repr(broken)
            if problem:
                failures[futures[future]] = problem
    except TimeoutError:
        late = [key for future, key in futures.items() if not future.done()]
        print(f"{len(late)} of {len(futures)} kernels are not compiled after {limit_s:.0f} s", flush=True)
        failures |= dict.fromkeys(late, "not compiled in time, or hangs")
        for process in list(pool._processes.values()):
            process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return failures


# ---------------------------------------------------------------------------------------------- check of "hopper"


def check_jobs() -> list[tuple[Layer, int, LinearConfig]]:
    """Every way through the kernel, at sizes that fill no tile, nor always end with one."""
    wanted: list[tuple[Layer, int, LinearConfig | None]] = []
    for op in OPS:
        n = 2016 if op == "norm_linear_silu_mul" else 1008
        fuse = op.startswith("norm")
        for k in (1024, 1096):
            layer = Layer("check", op, n, k)
            for m in (5, 16, 64, 100):
                wanted += [
                    (layer, m, hopper_config(m, k, 64, 64, 1, fuse_norm=fuse)),
                    (layer, m, hopper_config(m, k, 64, 64 if m > 64 else 128, 2, fuse_norm=fuse, per_sm=3)),
                    (
                        layer,
                        m,
                        hopper_config(m, k, 128, 64, 4, fuse_norm=fuse, num_warps=8 if m > 64 else 4),
                    ),
                    (layer, m, hopper_config(m, k, 128, 64, 2, fuse_norm=False, num_warps=8)),
                ]
            wanted += [
                (layer, 40, hopper_config(40, k, 32, 128, 1, fuse_norm=fuse, x_major=True)),
                (layer, 64, hopper_config(64, k, 32, 64, 4, fuse_norm=fuse, x_major=True)),
            ]
    wanted.append(
        (
            Layer("check", "norm_linear_silu_mul", 2016, 4096),
            64,
            hopper_config(64, 4096, 128, 64, 1, fuse_norm=True),
        )
    )
    wanted.append(
        (Layer("check", "linear_add", 1008, 14336), 8, hopper_config(8, 14336, 64, 128, 4, fuse_norm=False))
    )
    # More programs than run at once: they find what the ones before have left in shared memory.
    many = Layer("check", "norm_linear_silu_mul", 28672, 4096)
    wanted.append((many, 8, hopper_config(8, 4096, 64, 128, 1, fuse_norm=True)))
    return [(layer, m, config) for layer, m, config in wanted if config is not None]


def verdict(layer: Layer, m: int, config: LinearConfig) -> str:
    """What is wrong with a configuration, compared with fp32 and with itself, in graphs with and without PDL; or ''."""
    weight = torch.randn(layer.n, layer.k, dtype=torch.bfloat16, device=DEVICE) * 0.02
    given = inputs(layer, m, layer.n)
    before = given.residual.clone()
    first = run(layer.op, config, given, weight).clone()
    given.residual.copy_(before)
    worst = error(first, expected(layer.op, given, weight))
    if worst > 1:
        return f"error {worst:.2f}"
    for pdl in (True, False):
        results: list[torch.Tensor] = []

        def body(pdl: bool = pdl, results: list[torch.Tensor] = results) -> None:
            results.clear()
            for _ in range(4):
                given.residual.copy_(before)
                results.append(run(layer.op, config, given, weight, pdl).clone())

        graph_seconds(body, 4)
        if not all(torch.equal(result, first) for result in results):
            return f"not the same each time, PDL {pdl}"
    return ""


def check(workers: int, limit_s: float) -> bool:
    """Try all of `check_jobs`; prints what is wrong."""
    jobs = check_jobs()
    failures = compile_all(jobs, workers, limit_s)
    print(f"  {len(jobs)} configurations, {len(failures)} not compiled", flush=True)
    bad = 0
    for job in jobs:
        layer, m, config = job
        print(f"  {layer.op} {layer.n}x{layer.k} M={m} {label(config)}", end="\r", flush=True)
        wrong = failures.get(compile_key(job)) or verdict(*job)
        if wrong:
            bad += 1
            print(f"  {layer.op} {layer.n}x{layer.k} M={m} {label(config)}: {wrong}", flush=True)
    print(f"  {len(jobs) - bad} of {len(jobs)} are sound", flush=True)
    return bad == 0


def ended_in_time(process: subprocess.Popen[str], limit_s: float) -> bool:
    """Wait for the check, show what it says; False if it had to be ended."""
    try:
        text, _ = process.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        text += "\n  HANGS, killed: no configuration of hopper is timed"
    print("check of hopper:", *text.splitlines()[-25:], sep="\n", flush=True)
    return "HANGS" not in text


# --------------------------------------------------------------------------------------------------------- sweep


class Weights:
    """One buffer that all weights are views of."""

    def __init__(self, num_elements: int) -> None:
        self.buffer = torch.empty(num_elements, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)

    def copies(self, layer: Layer) -> list[torch.Tensor]:
        """As many as it takes to move 400 MB, if there is room for them."""
        size = layer.n * layer.k
        count = max(1, min(64, math.ceil(400e6 / layer.num_bytes), self.buffer.numel() // size))
        return [self.buffer[i * size : (i + 1) * size].view(layer.n, layer.k) for i in range(count)]


def time_one(
    layer: Layer, config: LinearConfig, given: Inputs, copies: list[torch.Tensor], reference: torch.Tensor
) -> dict[str, Any]:
    """Check a configuration, then time it."""
    row: dict[str, Any] = {"label": label(config), "config": asdict(config)}
    before = given.residual.clone()
    row["error"] = error(run(layer.op, config, given, copies[0]), reference)
    given.residual.copy_(before)
    if row["error"] > 1:
        return {**row, "problem": f"wrong: error {row['error']:.2f}"}
    seconds = graph_seconds(lambda: [run(layer.op, config, given, weight) for weight in copies], len(copies))
    given.residual.copy_(before)
    return {**row, "us": seconds * 1e6, "tb_s": layer.num_bytes / seconds / 1e12}


def sweep_layer(
    name: str,
    layer: Layer,
    m: int,
    kinds: frozenset[str],
    weights: Weights,
    failures: dict[tuple[Any, ...], str],
) -> list[dict[str, Any]]:
    """All candidates for a layer and `m` rows, the fastest first; prints a line."""
    copies, given = weights.copies(layer), inputs(layer, m, layer.n)
    reference = expected(layer.op, given, copies[0])
    plain = graph_seconds(lambda: [F.linear(given.x, weight) for weight in copies], len(copies))
    rows = []
    for config in candidates(layer, m, kinds):
        problem = failures.get(compile_key((layer, m, config)), "") if config.kind != "cublas" else ""
        row: dict[str, Any] = {"label": label(config), "config": asdict(config), "problem": problem}
        if not problem:
            try:
                row = time_one(layer, config, given, copies, reference)
            except Exception as broken:
                row["problem"] = f"{type(broken).__name__}: {str(broken)[:200]}"
        row |= {"model": name, "layer": layer.name, "op": layer.op, "n": layer.n, "k": layer.k, "m": m}
        rows.append(row)
    timed = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    cublas = next((row["us"] for row in timed if row["label"] == "cublas"), math.nan)
    shown = " | ".join(f"{row['us']:7.2f} {row['tb_s']:.2f} {row['label']}" for row in timed[:3])
    floor = layer.num_bytes / BANDWIDTH * 1e6
    print(
        f"{name} {layer.name:8} M={m:<3} floor {floor:6.2f} matmul {plain * 1e6:7.2f} cublas {cublas:7.2f} | {shown}",
        flush=True,
    )
    for row in rows:
        if row.get("problem"):
            print(f"    {row['label']}: {row['problem']}", flush=True)
    return timed + [row for row in rows if "us" not in row]


# -------------------------------------------------------------------------------------------------------- chains

Choice = Callable[[Layer, int], LinearConfig]


class Chain:
    """All matmuls of a model, each with weights of its own; attention is a view of the projection."""

    def __init__(self, shape: Model) -> None:
        self.shape = shape
        self.num_bytes = shape.num_layers * sum(x.num_bytes for x in shape.layers) + shape.head.num_bytes
        every = [layer for _ in range(shape.num_layers) for layer in shape.layers] + [shape.head]
        self.weights = [
            torch.empty(x.n, x.k, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.5 / math.sqrt(x.k))
            for x in every
        ]
        self.gain = torch.ones(shape.head.k, dtype=torch.bfloat16, device=DEVICE)

    def step(self, start: torch.Tensor, configs: dict[Layer, LinearConfig], pdl: bool) -> torch.Tensor:
        """Logits for a residual [m, hidden], which stays as it is."""
        residual = start.clone()
        qkv, o, gate_up, down = self.shape.layers
        remaining = iter(self.weights)
        for _ in range(self.shape.num_layers):
            given = Inputs(residual, self.gain, residual)
            x = run(qkv.op, configs[qkv], given, next(remaining), pdl)[:, : o.k]
            run(o.op, configs[o], Inputs(x, self.gain, residual), next(remaining), pdl)
            x = run(gate_up.op, configs[gate_up], given, next(remaining), pdl)
            run(down.op, configs[down], Inputs(x, self.gain, residual), next(remaining), pdl)
        given = Inputs(residual, self.gain, residual)
        return run(self.shape.head.op, configs[self.shape.head], given, next(remaining), pdl)

    def measure(self, name: str, m: int, choice: Choice) -> list[dict[str, Any]]:
        """The chosen configurations with and without PDL, and cuBLAS; prints a line each."""
        start = torch.randn(m, self.shape.head.k, dtype=torch.bfloat16, device=DEVICE)
        every = (*self.shape.layers, self.shape.head)
        chosen, plain = {x: choice(x, m) for x in every}, dict.fromkeys(every, CUBLAS)
        cases = (("cublas", plain, True), ("ours", chosen, True), ("ours, no PDL", chosen, False))
        rows, results = [], {}
        for case, configs, pdl in cases:
            kept: list[torch.Tensor] = []

            def body(
                configs: dict[Layer, LinearConfig] = configs, pdl: bool = pdl, kept: list[torch.Tensor] = kept
            ) -> None:
                kept[:] = [self.step(start, configs, pdl)]

            seconds = graph_seconds(body, 1, repeats=15)
            results[case] = kept[0].clone()
            tb_s = self.num_bytes / seconds / 1e12
            rows.append({"chain": name, "m": m, "case": case, "ms": seconds * 1e3, "tb_s": tb_s})
            print(f"{name} M={m:<3} {case:13} {seconds * 1e3:7.3f} ms {tb_s:.3f} TB/s", flush=True)
        reference = results["cublas"].float()
        difference = float((results["ours"].float() - reference).norm() / reference.norm())
        same = torch.equal(results["ours"], results["ours, no PDL"])
        rows[-1] |= {"difference": difference, "same_without_pdl": same}
        print(f"    differs from cublas by {difference:.4f}; same bits without PDL: {same}", flush=True)
        print("    " + ", ".join(f"{x.name}: {label(c)}" for x, c in chosen.items()), flush=True)
        return rows


def paste(rows: list[dict[str, Any]]) -> str:
    """The best configurations as entries of `linear_table.MEASURED`."""
    best: dict[tuple[int, int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            place = best.setdefault((row["n"], row["k"], row["op"]), {})
            if row["m"] not in place or row["us"] < place[row["m"]]["us"]:
                place[row["m"]] = row
    lines = []
    for (n, k, op), by_m in best.items():
        lines.append(f'    ({n}, {k}, "{op}"): (')
        for m, row in sorted(by_m.items()):
            config = LinearConfig(**row["config"])
            values = ", ".join(
                f"{name}={value!r}" for name, value in asdict(config).items() if name != "kind"
            )
            text = "CUBLAS" if config.kind == "cublas" else f'LinearConfig("{config.kind}", {values})'
            lines.append(f"        ({m}, {text}),")
        lines.append("    ),")
    return "\n".join(lines)


def main() -> None:
    """Run the sweep and the chains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--models", default="llama8b,qwen06b", help="of " + ", ".join(MODELS))
    parser.add_argument("--shapes", default="", help="layers to sweep, such as o,down (all)")
    parser.add_argument("--kinds", default="vector,skinny,hopper", help="kernels to sweep")
    parser.add_argument("--rows", default="", help="values of M, the most important first")
    parser.add_argument(
        "--check", action="store_true", help="only check the kernel for Hopper, in this process"
    )
    parser.add_argument("--check-limit", type=float, default=150, help="seconds after which the check hangs")
    parser.add_argument("--seconds", type=float, default=60, help="start no further sweep after so long")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile; 0 for none")
    parser.add_argument("--chains-only", action="store_true")
    parser.add_argument("--no-chains", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, for a machine without a GPU")
    args = parser.parse_args()
    models = TINY if args.dry_run else {name: MODELS[name] for name in args.models.split(",")}
    wanted = set(filter(None, args.shapes.split(",")))
    kinds = frozenset(args.kinds.split(","))
    every_m = [int(m) for m in filter(None, args.rows.split(","))] or (
        HOPPER_ROWS if kinds == {"hopper"} else ROWS
    )
    start = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.check:
        sys.exit(0 if check(args.workers, args.check_limit) else 1)
    layers = [
        (name, layer)
        for name, shape in models.items()
        for layer in (*shape.layers, shape.head)
        if not wanted or layer.name in wanted
    ]

    rows: list[dict[str, Any]] = []
    if not args.chains_only:
        checking = None
        if "hopper" in kinds and has_hopper_kernel(traits(DEVICE)):
            command = [sys.executable, __file__, "--check", "--workers", str(max(1, args.workers // 2))]
            checking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        jobs = [
            (layer, m, config)
            for m in every_m
            for _, layer in layers
            for config in candidates(layer, m, kinds)
        ]
        workers = min(args.workers, 1) if args.dry_run else args.workers
        failures = compile_all(jobs, workers, args.seconds)
        if checking is not None and not ended_in_time(
            checking, start + args.check_limit - time.perf_counter()
        ):
            kinds -= {"hopper"}
        print(f"{len(jobs)} timings; compiled in {time.perf_counter() - start:.0f} s", flush=True)
        weights = Weights(max(256 * 2**20 if not args.dry_run else 0, *(x.n * x.k for _, x in layers)))
        for m in every_m:
            for name, layer in layers:
                if time.perf_counter() - start > args.seconds:
                    print(f"{name} {layer.name} M={m}: no time left", flush=True)
                    continue
                rows += sweep_layer(name, layer, m, kinds, weights, failures)
        del weights
        print(f"swept in {time.perf_counter() - start:.0f} s", flush=True)

    def choice(layer: Layer, m: int) -> LinearConfig:
        found = [
            row
            for row in rows
            if (row["n"], row["k"], row["op"], row["m"]) == (layer.n, layer.k, layer.op, m)
        ]
        timed = [row for row in found if "us" in row]
        if timed:
            return LinearConfig(**min(timed, key=lambda row: row["us"])["config"])
        return present_choice(layer, m)

    chains: list[dict[str, Any]] = []
    if not args.no_chains:
        for name, shape in models.items():
            chain = Chain(shape)
            for m in CHAIN_ROWS:
                chains += chain.measure(name, m, choice)
            del chain
    if args.out:
        args.out.write_text(json.dumps({"sweep": rows, "chains": chains}, indent=1))
    print(paste(rows))
    print(f"all done in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
