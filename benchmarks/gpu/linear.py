"""Skinny linear layers: checks, sweeps launch parameters, times all matmuls of a model in one graph.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/linear.py --out linear.json

Every configuration is checked against fp32 before it is timed; a wrong or failing one is reported and passed over.
`--chains-only` takes the configurations from `linear_choice.choose`. The last lines are ready for its table.
"""

import argparse
import json
import math
import statistics
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
from charonia_kernels.gpu._launch import H100, INTERPRETED, traits
from charonia_kernels.gpu.linear_choice import choose
from charonia_kernels.gpu.linear_config import CUBLAS, LinearConfig, Op, tile_rows

if INTERPRETED:  # for --dry-run
    import_module("support.interpreter_floats")
    import_module("support.interpreter_products")
ops: Any = import_module("charonia_kernels.gpu.linear")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = 1e-5
BANDWIDTH = 2.97e12
ROWS = (1, 8, 64, 16, 4, 32, 2, 48, 128, 96)  # what counts most comes first
CHAIN_ROWS = (1, 8, 64)


@dataclass(frozen=True)
class Layer:
    """A weight [n, k] and what is done with it."""

    name: str
    op: Op
    n: int
    k: int

    @property
    def num_bytes(self) -> int:
        """Of the weight."""
        return 2 * self.n * self.k


@dataclass(frozen=True)
class Model:
    """The layers of a decoder in order, qkv, o, gate_up, down; then the head."""

    num_layers: int
    layers: tuple[Layer, ...]
    head: Layer


def model(num_layers: int, hidden: int, heads: int, inner: int, vocabulary: int, qkv: int) -> Model:
    """A decoder of these widths; heads is the width of the queries."""
    return Model(
        num_layers,
        (
            Layer("qkv", "norm_linear", qkv, hidden),
            Layer("o", "linear_add", hidden, heads),
            Layer("gate_up", "norm_linear_silu_mul", 2 * inner, hidden),
            Layer("down", "linear_add", hidden, inner),
        ),
        Layer("lm_head", "norm_linear", vocabulary, hidden),
    )


MODELS = {
    "llama8b": model(32, 4096, 4096, 14336, 128256, 6144),
    "qwen06b": model(28, 1024, 2048, 3072, 151936, 4096),
}
TINY = {"tiny": model(2, 64, 128, 96, 160, 256)}


# ---------------------------------------------------------------------------------------------------- candidates

VECTOR = (  # block_n, block_k, num_warps, prefetch
    (1, 2048, 4, 4096), (2, 2048, 4, 4096), (2, 2048, 4, 0), (4, 2048, 8, 4096), (2, 1024, 4, 4096),
    (4, 1024, 4, 4096), (8, 1024, 4, 4096), (2, 512, 2, 1024), (4, 512, 2, 1024), (8, 512, 2, 1024),
    (16, 256, 1, 1024),
)  # fmt: skip
SKINNY = (  # block_n, block_k, num_warps, num_stages, prefetch
    (16, 256, 4, 6, 2048), (32, 256, 4, 4, 2048), (32, 128, 4, 6, 2048), (64, 128, 4, 3, 2048),
    (64, 128, 4, 5, 2048), (64, 128, 4, 5, 0), (64, 256, 4, 3, 2048), (64, 64, 4, 6, 2048),
    (128, 64, 4, 5, 1024), (128, 64, 8, 5, 1024), (128, 128, 8, 3, 1024),
)  # fmt: skip


def vector_candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """Configurations whose sums fit a thread's registers."""
    found = []
    for block_n, block_k, num_warps, prefetch in VECTOR:
        config = LinearConfig("vector", block_n, block_k, num_warps=num_warps, prefetch=prefetch)
        sums = tile_rows(config, m) * block_n * max(1, block_k // (256 * num_warps))
        if sums > 32 or block_k > layer.k or (layer.op == "norm_linear_silu_mul" and block_n < 2):
            continue
        if layer.k % block_k and block_k > 1024:
            continue
        found.append(config)
    return found


def skinny_candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """Configurations that fit shared memory and give the device enough to do."""
    found = []
    for block_n, block_k, num_warps, num_stages, prefetch in SKINNY:
        tiles = math.ceil(layer.n / block_n)
        if (block_n == 128 and m <= 16) or (block_n < 64 and m > 64) or (block_n == 16 and tiles > 800):
            continue
        for split_k in (1, 2, 4, 8):
            programs = tiles * split_k
            if split_k > 1 and (programs > 300 or layer.k // split_k < 512 or layer.k % (split_k * block_k)):
                continue
            if programs < min(64, H100.num_sms * layer.n // 2048) or (split_k > 2 and programs > 150):
                continue
            config = LinearConfig("skinny", block_n, block_k, split_k, num_warps, num_stages, prefetch, 16)
            if config.shared_bytes(m, 2) < traits(DEVICE).max_shared_bytes - 2048:
                found.append(config)
    if m == 8:  # mma.m16n8k16 instead of wgmma
        found += [replace(config, block_m=8) for config in found if config.block_k == 256]
    if layer.op.startswith("norm") and m >= 16:
        shapes = {(64, 128), (128, 64)}
        found += [
            replace(c, fuse_norm=False)
            for c in found
            if c.split_k == 1 and (c.block_n, c.block_k) in shapes and c.prefetch and c.num_stages == 5
        ]
    return found


def candidates(layer: Layer, m: int) -> list[LinearConfig]:
    """All that may be worth timing for `m` rows, cuBLAS first."""
    found = [CUBLAS]
    if m <= 8:
        found += vector_candidates(layer, m)
    if m >= 4:
        skinny = skinny_candidates(layer, m)
        found += skinny if m > 4 else [c for c in skinny if c.block_n == 64 and c.num_stages >= 5]
    return found


def label(config: LinearConfig) -> str:
    """A short name, such as skinny-64x128/2 w4 s5 p2048."""
    if config.kind == "cublas":
        return "cublas"
    text = f"{config.kind}-{config.block_n}x{config.block_k}/{config.split_k} w{config.num_warps}"
    text += f" s{config.num_stages} m{config.block_m}" if config.kind == "skinny" else ""
    return f"{text} p{config.prefetch}" + ("" if config.fuse_norm else " own-norm")


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
    if config.kind == "vector":
        return own, fused, ops._prefetch_bytes(config, 2 * (layer.k - config.block_k)), layer.k
    whole = layer.k % (config.block_k * config.split_k) == 0
    return own, fused, ops._prefetch_bytes(config, 2 * layer.k // config.split_k) if whole else 0, whole


def compile_all(jobs: list[tuple[Layer, int, LinearConfig]], workers: int) -> dict[tuple[Any, ...], str]:
    """Compile side by side, in processes of their own. Returns what failed."""
    unique = {compile_key(job): job for job in jobs if job[2].kind != "cublas"}
    failures: dict[tuple[Any, ...], str] = {}
    if workers == 0:
        return failures
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, job): key for key, job in unique.items()}
        for future in as_completed(futures):
            try:
                problem = future.result()
            except Exception as broken:
                problem = repr(broken)
            if problem:
                failures[futures[future]] = problem
    return failures


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
    name: str, layer: Layer, m: int, weights: Weights, failures: dict[tuple[Any, ...], str]
) -> list[dict[str, Any]]:
    """All candidates for a layer and `m` rows, the fastest first; prints a line."""
    copies, given = weights.copies(layer), inputs(layer, m, layer.n)
    reference = expected(layer.op, given, copies[0])
    plain = graph_seconds(lambda: [F.linear(given.x, weight) for weight in copies], len(copies))
    rows = []
    for config in candidates(layer, m):
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
    parser.add_argument("--models", default="llama8b,qwen06b", help="of llama8b, qwen06b")
    parser.add_argument("--shapes", default="", help="layers to sweep, such as o,down (all)")
    parser.add_argument(
        "--rows", default=",".join(map(str, ROWS)), help="values of M, the most important first"
    )
    parser.add_argument("--seconds", type=float, default=60, help="start no further sweep after so long")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile; 0 for none")
    parser.add_argument("--chains-only", action="store_true")
    parser.add_argument("--no-chains", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, for a machine without a GPU")
    args = parser.parse_args()
    models = TINY if args.dry_run else {name: MODELS[name] for name in args.models.split(",")}
    wanted = set(filter(None, args.shapes.split(",")))
    every_m = [int(m) for m in args.rows.split(",")]
    start = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    layers = [
        (name, layer)
        for name, shape in models.items()
        for layer in (*shape.layers, shape.head)
        if not wanted or layer.name in wanted
    ]

    rows: list[dict[str, Any]] = []
    if not args.chains_only:
        jobs = [(layer, m, config) for m in every_m for _, layer in layers for config in candidates(layer, m)]
        failures = compile_all(jobs, min(args.workers, 1) if args.dry_run else args.workers)
        print(f"{len(jobs)} timings; compiled in {time.perf_counter() - start:.0f} s", flush=True)
        weights = Weights(max(256 * 2**20 if not args.dry_run else 0, *(x.n * x.k for _, x in layers)))
        for m in every_m:
            for name, layer in layers:
                if time.perf_counter() - start > args.seconds:
                    print(f"{name} {layer.name} M={m}: no time left", flush=True)
                    continue
                rows += sweep_layer(name, layer, m, weights, failures)
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
        return choose(m, layer.n, layer.k, torch.bfloat16, traits(DEVICE), layer.op)

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
