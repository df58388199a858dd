"""Norms, activations, rotary embedding, row lookups and row state on a GPU: checks, then times by launch parameters.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/elementwise.py --out elementwise.json
    TRITON_INTERPRET=1 PYTHONPATH=... python benchmarks/gpu/elementwise.py --dry-run     # no GPU, tiny shapes

A time is that of one launch among 50 of the same kernel in a CUDA graph, over rotating buffers; for few tokens these
stay in L2, as they do in a model. The floor is the bytes at 2.97 TB/s. Columns: the best parameters with programmatic
dependent launch (PDL), their time, bandwidth and share of the floor; the default parameters' time; the best
without PDL.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from charonia_kernels.gpu._launch import INTERPRETED
from charonia_kernels.gpu.norm import rms_norm
from elementwise_cases import EPS, MODELS, TINY, TRAITS, Case, Model, all_cases, distinct, normal
from elementwise_checks import capture, run_checks

BYTES_PER_US = 2.97e6
LAUNCHES = 50
ROTATE_BYTES = 128 << 20


def microseconds(run: Callable[[int, Any], object], config: Any, sets: int) -> float:
    """Median time of a launch in a graph of many."""
    if INTERPRETED:
        start = time.perf_counter()
        run(0, config)
        return (time.perf_counter() - start) * 1e6
    for i in range(sets):
        run(i, config)
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = [None] * sets  # so that outputs rotate too

    def launches() -> None:
        for i in range(LAUNCHES):
            kept[i % sets] = run(i % sets, config)

    capture(graph, launches)
    graph.replay()
    torch.cuda.synchronize()

    def timed(replays: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (replays * LAUNCHES)

    replays = min(max(int(3000 / (timed(1) * LAUNCHES)), 1), 20)
    return statistics.median(timed(replays) for _ in range(3))


def compile_all(models: tuple[Model, ...], counts: tuple[int, ...]) -> int:
    """Launch every kernel that will be timed, in threads, so that compilations overlap. Returns their number."""
    jobs: dict[Any, Callable[[], object]] = {}
    small: dict[Any, Callable[[int, Any], object]] = {}
    for tokens in counts:  # defaults depend on the number of tokens
        for case in all_cases(models, tokens):
            for config in case.configs:
                for use_pdl in {config.use_pdl, False}:
                    key = (case.op, case.model, replace(config, use_pdl=use_pdl))
                    jobs.setdefault(key, lambda key=key: small[key[:2]](0, key[2]))
    for case in all_cases(models, 1):
        small[(case.op, case.model)] = case.make(1)

    def attempt(job: tuple[Any, Callable[[], object]]) -> None:
        try:
            job[1]()
        except Exception as error:
            print(f"does not compile: {job[0]}: {type(error).__name__}: {str(error)[:200]}", flush=True)

    with ThreadPoolExecutor(1 if INTERPRETED else 16) as pool:
        list(pool.map(attempt, jobs.items()))
    synchronize()
    return len(jobs)


def sweep(case: Case) -> list[dict[str, Any]]:
    """A row for every configuration, with PDL; and for the best of them, and the default, without."""
    sets = min(max(-(-ROTATE_BYTES // max(case.bytes, 1)), 2), LAUNCHES)
    run = case.make(1 if INTERPRETED else sets)
    floor = case.bytes / BYTES_PER_US
    results: list[dict[str, Any]] = []

    def measure(config: Any) -> None:
        row = {
            "op": case.op, "model": case.model, "tokens": case.tokens, "config": str(config), "bytes": case.bytes,
            "use_pdl": config.use_pdl, "default": replace(config, use_pdl=TRAITS.has_pdl) == case.configs[0],
            "floor_us": floor, "key": config,
        }  # fmt: skip
        try:
            results.append({**row, "us": microseconds(run, config, sets)})
        except Exception as error:
            print(f"{case.op} {config}: {type(error).__name__}: {str(error)[:200]}", flush=True)

    for config in case.configs:
        measure(config)
    if results and TRAITS.has_pdl:
        best = min(results, key=lambda row: row["us"])["key"]
        for config in distinct(best, case.configs[0]):
            measure(replace(config, use_pdl=False))
    return results


def summary(results: list[dict[str, Any]]) -> str:
    """One line of the table."""
    with_pdl = [row for row in results if row["use_pdl"] == TRAITS.has_pdl]
    if not with_pdl:
        return "nothing ran"
    best = min(with_pdl, key=lambda row: row["us"])
    default = next((row["us"] for row in with_pdl if row["default"]), float("nan"))
    plain = min((row["us"] for row in results if not row["use_pdl"]), default=float("nan"))
    fields = ", ".join(
        f"{name}={getattr(best['key'], name)}"
        for name in best["key"].__dataclass_fields__
        if name != "use_pdl"
    )
    return (
        f"{best['op']:<19}{best['model']:<8}{best['tokens']:>6}{best['us']:>9.2f}{best['floor_us']:>9.2f}"
        f"{best['bytes'] / best['us'] / 1e6:>7.2f}{best['floor_us'] / best['us']:>6.0%}"
        f"{default:>9.2f}{plain:>9.2f}  {fields}"
    )


def host_cost() -> float:
    """Microseconds of Python and driver a launch."""
    x, weight = normal(1, MODELS[0].hidden), normal(MODELS[0].hidden)
    rms_norm(x, weight, EPS)
    synchronize()
    start = time.perf_counter()
    for _ in range(500):
        rms_norm(x, weight, EPS)
    seconds = time.perf_counter() - start
    synchronize()
    return seconds / 500 * 1e6


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if not INTERPRETED:
        torch.cuda.synchronize()


def main() -> None:
    """Check, compile, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048, 8192])
    parser.add_argument("--ops", nargs="+", help="time these only")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the interpreter")
    args = parser.parse_args()
    if args.dry_run != INTERPRETED:
        sys.exit("--dry-run and TRITON_INTERPRET=1 go together")
    models, counts = (TINY, (1, 3)) if INTERPRETED else (MODELS, tuple(args.tokens))
    torch.manual_seed(0)
    gc.disable()  # a collection during a capture could free what another graph owns
    begin = time.perf_counter()
    compiled = compile_all(models, counts)
    print(f"{compiled} kernels, {time.perf_counter() - begin:.1f} s", flush=True)
    failures = run_checks(models, (1, 5) if INTERPRETED else (1, 77, 2048))
    print(f"checks: {len(failures)} failed, {time.perf_counter() - begin:.1f} s", flush=True)
    if not INTERPRETED:
        print(f"host: {host_cost():.1f} us a launch of rms_norm", flush=True)
    print(
        "op                 model   tokens       us    floor   TB/s  of   default   no PDL  best parameters"
    )
    results: list[dict[str, Any]] = []
    try:
        for tokens in counts:
            for case in all_cases(models, tokens):
                if args.ops and case.op not in args.ops:
                    continue
                timed = sweep(case)
                results += timed
                print(summary(timed), flush=True)
                if not INTERPRETED:
                    torch.cuda.empty_cache()
    finally:
        if args.out is not None:
            rows = [{name: row[name] for name in row if name != "key"} for row in results]
            args.out.write_text(json.dumps({"failures": failures, "rows": rows}, indent=1))
    print(f"{time.perf_counter() - begin:.1f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
