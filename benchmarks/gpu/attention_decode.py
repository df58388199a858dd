"""Decode attention on a GPU: correctness at production sizes, then a sweep of launch parameters.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/attention_decode.py --out rows.json

Times are medians over graphs of several launches, each on a layer's cache of its own, so that keys and values come from
HBM. TB/s counts the bytes of keys and values that a launch has to read. `TRITON_INTERPRET=1 ... --dry-run` goes through
the script on a CPU, with tiny shapes and without timing.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from charonia_kernels.gpu._launch import traits
from charonia_kernels.gpu.attention_cascade import CascadeConfig, cascade_attention, cascade_config
from charonia_kernels.gpu.attention_decode import DecodeConfig, decode_attention, decode_config
from charonia_kernels.gpu.attention_plan import AttentionPlan, SplitConfig, build_plan
from charonia_kernels.gpu.paged_attention import paged_attention
from charonia_kernels.reference.paged_attention import paged_attention as oracle

FP8 = torch.float8_e4m3fn
L2_BYTES = 50 << 20


@dataclass(frozen=True)
class Shape:
    """A model's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128


@dataclass(frozen=True)
class Work:
    """Keys of each entry, all of one query token; `shared` of them are the same blocks for all."""

    name: str
    keys: tuple[int, ...]
    shared: int = 0
    queries: tuple[int, ...] | None = None
    max_query: int = 1
    window: int | None = None


LLAMA, QWEN = Shape("llama8b", 32, 8), Shape("qwen06b", 16, 8)


def uniform(batch: int, keys: int) -> Work:
    """Entries of one length."""
    return Work(f"{batch}x{keys}", (keys,) * batch)


def lognormal(batch: int, most: int = 2000) -> Work:
    """Entries of many lengths, a few of them long."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.empty(batch).log_normal_(5.8, 1.0, generator=generator).clamp(10, most).long()
    return Work(f"{batch}xmixed", tuple(keys.tolist()))


WORKS = (
    uniform(16, 8192), uniform(256, 500), lognormal(256), uniform(1, 256), uniform(64, 384), uniform(1, 8192),
    uniform(512, 300), uniform(1, 65536),
)  # fmt: skip
CASCADE = Work("256x2048+160", (2208,) * 256, shared=2048)
CHECKS = (
    lognormal(64), uniform(1, 65536), uniform(3, 64),
    Work("verify", (900, 33, 4, 5000, 64, 65), queries=(4, 3, 4, 1, 2, 4), max_query=4),
    Work("window", (9000, 100, 4096, 4097, 1), window=4096),
    Work("cascade", (2208,) * 63 + (9000,), shared=2048),
    Work("with prefills", (900, 33, 5000, 700, 64), queries=(1, 20, 1, 700, 1)),
)  # fmt: skip
TINY = (uniform(2, 40), Work("tiny", (100, 33, 70), shared=32))
DECODE_CONFIGS = tuple(
    DecodeConfig(*values)
    for values in (
        (64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 8, 3), (64, 2, 3), (64, 1, 3), (32, 4, 4), (32, 2, 4), (32, 4, 5),
        (32, 1, 4), (128, 4, 2), (128, 8, 2), (128, 8, 3), (128, 4, 3),
    )
)  # fmt: skip
SMALL_BLOCK_CONFIGS = tuple(
    DecodeConfig(*values)
    for values in (
        (64, 4, 3),
        (64, 4, 4),
        (64, 8, 3),
        (64, 2, 3),
        (32, 4, 4),
        (32, 2, 4),
        (32, 4, 5),
        (128, 8, 3),
    )
)
CASCADE_CONFIGS = tuple(
    CascadeConfig(*values)
    for values in (
        (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2),
        (64, 128, 4, 3), (128, 64, 8, 2),
    )
)  # fmt: skip


class Setting:
    """Caches of several layers and the tensors of a workload."""

    def __init__(
        self, shape: Shape, block_size: int, work: Work, device: torch.device, dtype: torch.dtype,
        *, fp8: bool = False, layers: int | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.block_size, self.work, self.device, self.dtype = (
            shape,
            block_size,
            work,
            device,
            dtype,
        )
        cache_dtype = FP8 if fp8 else dtype
        shared_blocks = work.shared // block_size
        own = [-(-keys // block_size) - shared_blocks for keys in work.keys]
        num_blocks = 1 + shared_blocks + sum(own)
        block_bytes = 2 * shape.num_kv_heads * block_size * shape.head_dim * cache_dtype.itemsize
        self.read_bytes = (
            2 * shape.num_kv_heads * shape.head_dim * cache_dtype.itemsize
            * (work.shared + sum(keys - work.shared for keys in work.keys))
        )  # fmt: skip
        self.layers = (
            layers
            or (1 if device.type == "cpu" else 0)
            or max(2, min(64, -(-6 * L2_BYTES // (num_blocks * block_bytes))))
        )
        generator = torch.Generator(device=device).manual_seed(0)
        cache_shape = (self.layers, num_blocks, shape.num_kv_heads, block_size, shape.head_dim)

        def cache() -> torch.Tensor:
            made = torch.empty(cache_shape, dtype=cache_dtype, device=device)
            for layer in made:
                layer.copy_(torch.randn(layer.shape, generator=generator, device=device, dtype=torch.float32))
            return made

        self.key_cache, self.value_cache = cache(), cache()
        order = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1).tolist()
        common = [order.pop() for _ in range(shared_blocks)]
        width = max(own) + shared_blocks + 3
        table = torch.zeros(len(own) + 1, width, dtype=torch.int32)
        for row, count in enumerate(own):
            blocks = common + [order.pop() for _ in range(count)]
            table[row + 1, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.table = table.to(device)
        self.rows = torch.arange(1, len(own) + 1, dtype=torch.int32, device=device)
        queries = work.queries or (1,) * len(own)
        self.starts = torch.tensor([0, *queries], dtype=torch.int64).cumsum(0).to(device, torch.int32)
        self.seq_lens = torch.tensor(work.keys, dtype=torch.int32, device=device)
        self.prefix = torch.tensor([work.shared], dtype=torch.int32, device=device)
        self.tokens = sum(queries)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        wide = torch.randn(self.tokens, heads, shape.head_dim, generator=generator, device=device)
        self.q = wide.to(dtype)[:, : shape.num_heads]
        self.out = torch.empty(self.q.shape, dtype=dtype, device=device)
        self.scale = shape.head_dim**-0.5
        scale = torch.tensor([0.5], device=device)
        self.k_scale = self.v_scale = scale if fp8 else None
        self.kinds = [count <= work.max_query for count in queries]

    def plan(self, split: SplitConfig | None = None, cascade: bool | None = None) -> AttentionPlan:
        """A filled plan."""
        shape, work = self.shape, self.work
        if split is None and self.device.type == "cpu":
            split = SplitConfig(4, self.block_size, self.block_size, 32)
        cascade = bool(work.shared) if cascade is None else cascade
        largest = AttentionPlan.allocate(
            len(work.keys), self.tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim, self.block_size,
            self.device, work.max_query, cascade, split,
        )  # fmt: skip
        plan = largest.sized(len(work.keys), self.tokens, any(self.kinds), not all(self.kinds), cascade)
        build_plan(plan, self.starts, self.seq_lens, self.rows, self.prefix)
        return plan

    def decode(self, plan: AttentionPlan, config: DecodeConfig, cascade: CascadeConfig | None = None) -> None:
        """One launch a layer, or two with a shared prefix."""
        for keys, values in zip(self.key_cache, self.value_cache, strict=True):
            if plan.has_cascade:
                cascade_attention(self.q, keys, values, self.table, plan, self.scale, config=cascade)
            decode_attention(
                self.q, keys, values, self.table, plan, self.out, self.scale, None, None, self.k_scale, self.v_scale,
                config=config,
            )  # fmt: skip


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `run` launches; it has run once before."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[], None], launches: int, dry: bool) -> float:
    """Median time of a launch."""
    if dry:
        run()
        return 1.0
    graph = graph_of(run)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for mark in marks:
        mark.record()
        graph.replay()
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in itertools.pairwise([*marks, end])]
    return statistics.median(times) * 1000 / launches


def attention(setting: Setting, plan: AttentionPlan) -> torch.Tensor:
    """The first layer, into the setting's own output."""
    return paged_attention(
        setting.q, setting.key_cache[0], setting.value_cache[0], setting.table, plan, setting.scale,
        setting.work.window, None, setting.k_scale, setting.v_scale, out=setting.out,
    )  # fmt: skip


def check(setting: Setting, dry: bool) -> str:
    """Compare with the oracle, eagerly and replayed from a graph. Returns what is wrong, or an empty string."""
    plan = setting.plan()
    expected = oracle(
        setting.q.float(), setting.key_cache[0], setting.value_cache[0], setting.table, setting.seq_lens,
        setting.starts, setting.scale, setting.work.window, None, setting.rows, setting.k_scale, setting.v_scale,
    )  # fmt: skip
    setting.out.fill_(float("nan"))
    first = attention(setting, plan).clone()
    error = (first.float() - expected).abs().nan_to_num(nan=1e9).amax(dim=(1, 2))
    ratio = error / expected.abs().amax(dim=(1, 2))
    if not bool(ratio.max() < 0.015):
        return (
            f"off by {ratio.max().item():.4f} of the token's largest output at token {ratio.argmax().item()}"
        )
    graph = None if dry else graph_of(lambda: attention(setting, plan))
    for _ in range(1 if dry else 20):
        setting.out.fill_(float("nan"))
        if graph:
            graph.replay()
        else:
            attention(setting, plan)
        if not torch.equal(setting.out, first):
            return "not the same when repeated"
    return "counters are not zero" if plan.workspace.counters.any() else ""


def checks(device: torch.device, dtype: torch.dtype, dry: bool) -> list[dict[str, Any]]:
    """Run all checks; kernels are compiled side by side first."""
    rows = []
    cases: Iterator[tuple[Work, int, bool]] = itertools.chain(
        ((work, 64, False) for work in CHECKS), ((work, 16, False) for work in (CHECKS[0], CHECKS[3], CHECKS[5])),
        ((work, 64, True) for work in (CHECKS[0], CHECKS[5])), ((CHECKS[0], 16, True), (CHECKS[0], 128, False)),
    )  # fmt: skip
    if dry:
        cases = ((work, 16, fp8) for work in TINY for fp8 in (False, True))
    shape = Shape("tiny", 4, 2, 64) if dry else LLAMA
    settings = [
        Setting(shape, block_size, work, device, dtype, fp8=fp8, layers=1) for work, block_size, fp8 in cases
    ]

    def compile_for(setting: Setting) -> None:
        with suppress(Exception):
            attention(setting, setting.plan())

    if not dry:
        compile_for(settings[0])
        with ThreadPoolExecutor(14) as pool:
            list(pool.map(compile_for, settings))
        torch.cuda.synchronize()
    for setting in settings:
        work, block_size, fp8 = setting.work, setting.block_size, setting.k_scale is not None
        try:
            wrong = check(setting, dry)
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append({"check": work.name, "block_size": block_size, "fp8": fp8, "wrong": wrong})
        print(f"check {work.name:14s} block {block_size:3d} fp8 {fp8!s:5s}: {wrong or 'ok'}", flush=True)
    return rows


class Sweep:
    """Collects rows; stops starting new measurements when the time is up."""

    def __init__(self, device: torch.device, dtype: torch.dtype, dry: bool, deadline: float) -> None:
        self.device, self.dtype, self.dry, self.deadline = device, dtype, dry, deadline
        self.rows: list[dict[str, Any]] = []
        self.failed: set[object] = set()

    def measure(
        self,
        setting: Setting,
        plan: AttentionPlan,
        config: DecodeConfig,
        cascade: CascadeConfig | None = None,
    ) -> float | None:
        """Microseconds of a launch; None when it failed before, fails now, or time is up."""
        key = (setting.shape, setting.block_size, setting.k_scale is None, config, cascade)
        if key in self.failed or time.monotonic() > self.deadline:
            return None
        row = {
            "shape": setting.shape.name, "block_size": setting.block_size, "fp8": setting.k_scale is not None,
            "work": setting.work.name, **asdict(config), "target_items": plan.split.target_items,
            "min_chunk": plan.split.min_chunk, "cascade": asdict(cascade) if cascade else plan.has_cascade,
        }  # fmt: skip
        try:
            us = microseconds(lambda: setting.decode(plan, config, cascade), setting.layers, self.dry)
        except Exception as error:
            self.failed.add(key)
            self.rows.append({**row, "error": f"{type(error).__name__}: {str(error)[:200]}"})
            return None
        self.rows.append({**row, "us": us, "tb_s": setting.read_bytes / us / 1e6})
        return us

    def compile(self, shape: Shape, block_size: int, configs: tuple[DecodeConfig, ...], fp8: bool) -> None:
        """Compile all configurations side by side."""
        setting = Setting(shape, block_size, uniform(1, 40), self.device, self.dtype, fp8=fp8, layers=1)
        plan = setting.plan()

        def one(config: DecodeConfig) -> None:
            try:
                setting.decode(plan, config)
            except Exception as error:
                self.failed.add((shape, block_size, not fp8, config, None))
                self.rows.append(
                    {
                        "shape": shape.name,
                        "block_size": block_size,
                        **asdict(config),
                        "error": str(error)[:200],
                    }
                )

        with ThreadPoolExecutor(1 if self.dry else 4) as pool:
            list(pool.map(one, configs))
        if not self.dry:
            torch.cuda.synchronize()

    def workload(
        self,
        shape: Shape,
        block_size: int,
        work: Work,
        configs: tuple[DecodeConfig, ...],
        splits: bool,
        fp8: bool = False,
    ) -> None:
        """Kernel parameters with the standard split, then splits with the best of them."""
        if time.monotonic() > self.deadline:
            return
        setting = Setting(shape, block_size, work, self.device, self.dtype, fp8=fp8)
        plan = setting.plan()
        standard = decode_config(
            plan.rows_per_entry,
            shape.head_dim,
            block_size,
            setting.key_cache.element_size(),
            traits(self.device),
        )
        base = self.measure(setting, plan, standard)
        found = [
            (us, config) for config in configs if (us := self.measure(setting, plan, config)) is not None
        ]
        if base is None or not found:
            print(f"{shape.name} block {block_size} {work.name}: nothing ran", flush=True)
            return
        us, config = min(found, key=lambda pair: pair[0])
        best_split = plan.split
        if splits:
            sms, align = traits(self.device).num_sms, plan.split.align
            for per_sm, chunk in itertools.product((1, 2, 3, 4, 6, 8), (64, 128, 256)):
                split = replace(
                    plan.split,
                    target_items=-(-per_sm * sms // shape.num_kv_heads),
                    min_chunk=max(chunk, align),
                )
                if (
                    split != plan.split
                    and (time_ := self.measure(setting, setting.plan(split), config)) is not None
                ):
                    us, best_split = min((us, best_split), (time_, split), key=lambda pair: pair[0])
        print(
            f"{shape.name:8s} block {block_size:3d} {'fp8 ' if fp8 else ''}{work.name:12s} standard {base:8.1f} us "
            f"{setting.read_bytes / base / 1e6:5.2f} TB/s | "
            f"best {us:8.1f} us {setting.read_bytes / us / 1e6:5.2f} TB/s "
            f"tile {config.tile} warps {config.num_warps} stages {config.num_stages} "
            f"target {best_split.target_items} min {best_split.min_chunk}",
            flush=True,
        )  # fmt: skip

    def cascade(self, shape: Shape, work: Work) -> None:
        """With and without the shared prefix taken once."""
        if time.monotonic() > self.deadline:
            return
        setting = Setting(shape, 32 if self.dry else 64, work, self.device, self.dtype)
        plain = setting.plan(cascade=False)
        config = decode_config(
            plain.rows_per_entry, shape.head_dim, setting.block_size, 2, traits(self.device)
        )
        print(
            f"{shape.name} {work.name} without cascade: {self.measure(setting, plain, config)} us", flush=True
        )
        configs = (cascade_config(128, shape.head_dim, 2, traits(self.device)), *CASCADE_CONFIGS)
        configs = configs[:1] if self.dry else configs

        def compile_for(cascade: CascadeConfig) -> None:
            with suppress(Exception):
                setting.decode(shared_plan, config, cascade)

        shared_plan = setting.plan()
        with ThreadPoolExecutor(1 if self.dry else 9) as pool:
            list(pool.map(compile_for, configs))
        found = []
        for shared_rows in (64,) if self.dry else (32, 64, 128, 256):
            plan = setting.plan(replace(shared_plan.split, shared_rows=shared_rows))
            chunks = plan.shared_chunks(traits(self.device).num_sms)
            for cascade in configs:
                us = self.measure(setting, plan, config, cascade)
                if us is not None:
                    found.append((us, chunks, cascade))
                    self.rows[-1]["chunks"] = chunks
        for us, chunks, cascade in sorted(found, key=lambda item: item[0])[:4]:
            print(f"{shape.name} {work.name}: {us:.1f} us, {chunks} chunks, {cascade}", flush=True)

    def plans(self, shape: Shape) -> None:
        """What filling the work lists takes."""
        for batch in (1,) if self.dry else (1, 32, 256, 1024):
            setting = Setting(shape, 64, uniform(batch, 64), self.device, self.dtype, layers=1)
            plan = replace(setting.plan(), has_prefills=True)

            def run(plan: AttentionPlan = plan, setting: Setting = setting) -> None:
                for _ in range(20):
                    build_plan(plan, setting.starts, setting.seq_lens, setting.rows)

            us = microseconds(run, 20, self.dry)
            self.rows.append({"plan": batch, "us": us})
            print(f"build_plan, batch {batch}: {us:.2f} us", flush=True)


def main() -> None:
    """Run the checks and the sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write all rows here, as JSON")
    parser.add_argument(
        "--budget", type=float, default=85.0, help="seconds after which no new measurement starts"
    )
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    dry = args.dry_run
    start = time.monotonic()
    device = torch.device("cpu" if dry else "cuda")
    dtype = torch.float16 if dry else torch.bfloat16
    rows = checks(device, dtype, dry)
    print(f"checks took {time.monotonic() - start:.1f} s", flush=True)
    sweep = Sweep(device, dtype, dry, start + args.budget)
    if not args.checks_only:
        shapes = (Shape("tiny", 4, 2, 64),) if dry else (LLAMA, QWEN)
        works = TINY[:1] if dry else WORKS
        large = DECODE_CONFIGS[:1] if dry else DECODE_CONFIGS
        small = SMALL_BLOCK_CONFIGS[:1] if dry else SMALL_BLOCK_CONFIGS
        jobs = [
            (shape, size, fp8)
            for shape in shapes
            for size, fp8 in ((64, False), (16, False), (32, False), (64, True))
        ]
        with ThreadPoolExecutor(1 if dry else len(jobs)) as pool:
            list(
                pool.map(
                    lambda job: sweep.compile(job[0], job[1], large if job[1] == 64 else small, job[2]), jobs
                )
            )
        print(f"compiled after {time.monotonic() - start:.1f} s", flush=True)
        for shape in shapes:
            for work in works:
                sweep.workload(shape, 64, work, large, splits=not dry)
        for shape in shapes:
            sweep.cascade(shape, TINY[1] if dry else CASCADE)
        sweep.plans(shapes[0])
        for size, fp8, shape in itertools.product((64, 16, 32), (False, True), shapes):
            if (size, fp8) == (64, False) or (size != 64 and fp8):
                continue
            for work in works[:3]:
                sweep.workload(shape, size, work, large if size == 64 else small, splits=False, fp8=fp8)
    print(
        f"took {time.monotonic() - start:.1f} s, {sum('error' in row for row in sweep.rows)} failed",
        flush=True,
    )
    for row in sweep.rows:
        if "error" in row:
            print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows + sweep.rows))
    if any(row["wrong"] for row in rows):
        raise SystemExit("some results are wrong")


if __name__ == "__main__":
    main()
