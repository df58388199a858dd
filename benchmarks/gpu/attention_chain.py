"""Decode attention where it stands in a step: between the QKV product and the output product, under PDL, in a graph.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/attention_chain.py --out chain.json

First each configuration of the Hopper kernel is checked against fp32, in a process of its own that is ended when its
time is up, since a wrong barrier hangs; what is wrong or late is not timed. Meanwhile other processes compile the
linear layers. Then chains of layers [norm + QKV product, norm + rotation + KV write, attention, output product +
residual], weights and caches of their own each, are replayed in turns: without attention, with the portable kernel,
with each configuration, and with other splits for the best of them. Times are medians, in microseconds a layer.
`TRITON_INTERPRET=1 ... --dry-run` goes through it with the portable kernel and tiny shapes on a CPU.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from charonia_kernels.gpu._launch import INTERPRETED, traits
from charonia_kernels.gpu.attention_decode import DecodeConfig, decode_attention, decode_config
from charonia_kernels.gpu.attention_decode_hopper import HopperDecodeConfig
from charonia_kernels.gpu.attention_plan import AttentionPlan, SplitConfig, build_plan
from charonia_kernels.gpu.rope import qk_norm_rope_write

if INTERPRETED:  # for --dry-run
    import_module("support.interpreter")
linear: Any = import_module("charonia_kernels.gpu.linear")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
EPS = 1e-6
BLOCK = 64
Config = DecodeConfig | HopperDecodeConfig


@dataclass(frozen=True)
class Shape:
    """A model's attention and what surrounds it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    layers: int
    qk_norm: bool


SHAPES = {
    "llama8b": Shape(32, 8, 128, 4096, 8, False),
    "qwen06b": Shape(16, 8, 128, 1024, 16, True),
}
TINY = {"tiny": Shape(4, 2, 64, 64, 2, True)}
WORKS = ((1, 256), (64, 256), (8, 256), (64, 384), (256, 600), (1, 4096), (1, 16384))
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 1000, 5000)
LONG_ITEMS = SplitConfig(3, 128, 64, 128)
CONFIGS = (
    HopperDecodeConfig(64, 2, 2),
    HopperDecodeConfig(128, 1, 1),
    HopperDecodeConfig(64, 1, 1),
    HopperDecodeConfig(64, 2, 2, early=False),
    HopperDecodeConfig(64, 2, 1),
    HopperDecodeConfig(64, 4, 4),
    HopperDecodeConfig(128, 2, 2),
    HopperDecodeConfig(128, 1, 1, num_warps=8),
    HopperDecodeConfig(256, 1, 1, num_warps=8),
    HopperDecodeConfig(64, 3, 3),
)


def label(config: Config | None, split: SplitConfig | None = None) -> str:
    """A short name, such as hopper 64 2+2 w4."""
    if config is None:
        return "no attention"
    if isinstance(config, DecodeConfig):
        text = "portable"
    else:
        text = f"hopper {config.tile} {config.key_stages}+{config.value_stages} w{config.num_warps}"
        text += "" if config.early else " late"
    return text + (f" [{split.target_items} items of {split.min_chunk}+]" if split else "")


class Cache:
    """Caches of some layers, [layers, blocks, KV heads, BLOCK, D], and the batch that attends them.

    Keys that do not exist are NaN. Entry b's row of the table is b + 1; block 0 belongs to nobody.
    """

    def __init__(self, shape: Shape, lengths: tuple[int, ...], layers: int) -> None:
        self.shape, self.lengths = shape, lengths
        counts = [-(-length // BLOCK) for length in lengths]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).tolist()
        table = torch.zeros(len(lengths) + 1, max(counts) + 2, dtype=torch.int32)
        sizes = (layers, sum(counts) + 1, shape.num_kv_heads, BLOCK, shape.head_dim)
        self.keys, self.values = (torch.empty(sizes, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2))
        slots = []
        for entry, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks = [order.pop() for _ in range(count)]
            table[entry + 1, :count] = torch.tensor(blocks)
            slots.append(blocks[-1] * BLOCK + (length - 1) % BLOCK)
            for cache in (self.keys, self.values):
                cache[:, blocks[-1], :, (length - 1) % BLOCK + 1 :] = float("nan")
        self.table = table.to(DEVICE)
        self.slots = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.positions = self.seq_lens - 1
        self.rows = torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
        self.scale = shape.head_dim**-0.5
        self._plans: dict[SplitConfig | None, AttentionPlan] = {}

    def plan(self, split: SplitConfig | None = None) -> AttentionPlan:
        """A filled plan of buffers of its own."""
        if split not in self._plans:
            shape, batch = self.shape, len(self.lengths)
            plan = AttentionPlan.allocate(
                batch, batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK, DEVICE, split=split
            ).sized(batch, batch, True, False, only_newest_key_is_new=True)
            build_plan(plan, self.starts, self.seq_lens, self.rows)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            self._plans[split] = plan
        return self._plans[split]

    def portable(self) -> DecodeConfig:
        """What the portable kernel runs with."""
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        return decode_config(group, shape.head_dim, BLOCK, self.keys.element_size(), traits(DEVICE))

    def attend(
        self, q: torch.Tensor, layer: int, out: torch.Tensor, config: Config, plan: AttentionPlan
    ) -> None:
        """One launch."""
        decode_attention(
            q, self.keys[layer], self.values[layer], self.table, plan, out, self.scale, config=config
        )


# -------------------------------------------------------------------------------------------------------- checks


def reference(q: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Attention to layer 0 in fp32, entry by entry."""
    out = torch.empty(q.shape, dtype=torch.float32, device=DEVICE)
    group = cache.shape.num_heads // cache.shape.num_kv_heads
    for entry, length in enumerate(cache.lengths):
        blocks = cache.table[entry + 1, : -(-length // BLOCK)].long()
        keys, values = (
            part[0, blocks].float().transpose(0, 1).flatten(1, 2)[:, :length]
            for part in (cache.keys, cache.values)
        )
        rows = q[entry].float().unflatten(0, (-1, group)) * cache.scale
        out[entry] = torch.softmax(rows @ keys.transpose(1, 2), -1).matmul(values).flatten(0, 1)
    return out


def verdict(shape: Shape, lengths: tuple[int, ...], config: Config, split: SplitConfig | None) -> str:
    """What is wrong with a configuration on a batch, called and replayed from a graph; or ''."""
    cache = Cache(shape, lengths, 1)
    plan = cache.plan(split)
    wide = torch.randn(len(lengths), shape.num_heads + 3, shape.head_dim, device=DEVICE).to(DTYPE)
    q = wide[:, : shape.num_heads]
    out = torch.full(q.shape, float("nan"), dtype=DTYPE, device=DEVICE)
    cache.attend(q, 0, out, config, plan)
    expected = reference(q, cache)
    error = (out.float() - expected).abs().nan_to_num(nan=1e9).amax((1, 2)) / expected.abs().amax((1, 2))
    if not bool(error.max() < 0.015):
        worst = int(error.argmax())
        return f"off by {error.max().item():.4f} of the largest at entry {worst} of {lengths[worst]} keys"
    first = out.clone()

    def body() -> None:
        out.fill_(float("nan"))
        for _ in range(3):
            cache.attend(q, 0, out, config, plan)

    replay = graph_of(body)
    for _ in range(5):
        replay()
        if not torch.equal(out, first):
            return "not the same when repeated"
    return "counters are not zero" if plan.workspace.counters.any() else ""


def check(config: Config, shapes: dict[str, Shape], dry: bool) -> str:
    """Try a configuration on all batches; what is wrong first, or ''."""
    batches = [(length,) for length in LENGTHS] + [
        tuple(LENGTHS[i * 7 % len(LENGTHS)] for i in range(batch)) for batch in (3, 8, 64, 256)
    ]
    if dry:
        batches = [(65, 1)]
    for name, shape in shapes.items():
        for lengths in batches:
            for split in (None, LONG_ITEMS) if len(lengths) < 9 else (None,):
                wrong = verdict(shape, lengths, config, split)
                if wrong:
                    return f"{name}, {len(lengths)} entries, first of {lengths[0]}, {split}: {wrong}"
    return ""


# -------------------------------------------------------------------------------------------------------- chains


def graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """Something that replays what `run` launches."""
    run()
    if DEVICE.type == "cpu":
        return lambda: None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Chain:
    """Layers of a model around attention, for a batch."""

    def __init__(self, shape: Shape, rows: int, keys: int, layers: int) -> None:
        self.shape, self.layers = shape, layers
        self.cache = Cache(shape, (keys,) * rows, layers)
        width, inner = (
            (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,
            shape.num_heads * shape.head_dim,
        )

        def weights(n: int, k: int) -> list[torch.Tensor]:
            deviation = 0.5 / math.sqrt(k)
            return [
                torch.empty(n, k, dtype=DTYPE, device=DEVICE).normal_(0, deviation) for _ in range(layers)
            ]

        self.qkv, self.o = weights(width, shape.hidden), weights(shape.hidden, inner)
        self.gain = torch.ones(shape.hidden, dtype=DTYPE, device=DEVICE)
        self.head_gain = torch.ones(shape.head_dim, dtype=DTYPE, device=DEVICE) if shape.qk_norm else None
        angles = torch.rand(keys, shape.head_dim // 2, device=DEVICE) * 6.28
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1).contiguous()
        self.start = torch.randn(rows, shape.hidden, device=DEVICE).to(DTYPE)
        self.out = torch.zeros(rows, shape.num_heads, shape.head_dim, dtype=DTYPE, device=DEVICE)

    def run(self, config: Config | None, split: SplitConfig | None = None) -> torch.Tensor:
        """The residual behind all layers; config None leaves attention out."""
        shape, cache = self.shape, self.cache
        plan = cache.plan(split)
        residual = self.start.clone()
        for layer in range(self.layers):
            x = linear.norm_linear(residual, self.gain, EPS, self.qkv[layer])
            q = qk_norm_rope_write(
                x, cache.positions, cache.slots, self.cos_sin, cache.keys[layer], cache.values[layer],
                shape.num_heads, shape.num_kv_heads, shape.head_dim, self.head_gain, self.head_gain, EPS,
            )  # fmt: skip
            if config is not None:
                cache.attend(q, layer, self.out, config, plan)
            linear.linear_add(self.out.flatten(1) if config else q.flatten(1), self.o[layer], residual)
        return residual


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Their difference, as a part of what is expected."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


Entry = tuple[Config | None, SplitConfig | None]


def measure(chain: Chain, entries: list[Entry], repeats: int) -> list[dict[str, Any]]:
    """Times of a layer; the entries take turns. Results are compared with those of the portable kernel."""
    expected = chain.run(chain.cache.portable()).clone()
    last = chain.out.clone()
    rows, replays = [], []
    for config, split in entries:
        kept: list[torch.Tensor] = []

        def body(
            config: Config | None = config, split: SplitConfig | None = split, kept: list[torch.Tensor] = kept
        ) -> None:
            kept[:] = [chain.run(config, split)]

        row: dict[str, Any] = {"label": label(config, split), "problem": "", "times": []}
        try:
            replay = graph_of(body)
            # What the newest slots held before the chain writes them must not matter.
            blocks, places = chain.cache.slots.long() // BLOCK, chain.cache.slots.long() % BLOCK
            chain.cache.keys[:, blocks, :, places] = float("nan")
            chain.cache.values[:, blocks, :, places] = float("nan")
            replay()
            if config is not None:
                row["difference"] = max(relative(kept[0], expected), relative(chain.out, last))
                if not row["difference"] < 0.03:
                    row["problem"] = f"differs from the portable kernel's by {row['difference']:.4f}"
            replays.append((row, replay))
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
    for _ in range(repeats):
        for row, replay in replays:
            if DEVICE.type == "cpu":
                row["times"].append(1.0)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            row["times"].append(begin.elapsed_time(end) * 1e3 / chain.layers)
    for row in rows:
        row["us"] = statistics.median(row.pop("times") or [math.nan])
    return rows


def splits_for(plan: AttentionPlan) -> list[SplitConfig]:
    """Other ways to divide the keys."""
    now = plan.split
    if plan.batch <= 8:
        chunks = (64, 128, 256, 512)
        found = [replace(now, min_chunk=chunk) for chunk in chunks]
        found += [
            replace(now, target_items=2 * now.target_items),
            replace(now, target_items=now.target_items // 2),
        ]
    else:
        found = [replace(now, target_items=max(1, now.target_items * part // 4)) for part in (1, 2, 8)]
        found += [replace(now, min_chunk=512)]
    return [split for split in found if split != now][: 1 if DEVICE.type == "cpu" else None]


def time_all(
    shapes: dict[str, Shape], works: tuple[tuple[int, int], ...], configs: list[Config], deadline: float,
    repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Chains of all workloads, until time is up; prints a table each."""
    rows: list[dict[str, Any]] = []
    for batch, keys in works:
        for name, shape in shapes.items():
            if time.monotonic() > deadline:
                print(f"{name} {batch} x {keys}: no time left", flush=True)
                continue
            chain = Chain(shape, batch, keys, shape.layers)
            portable = chain.cache.portable()
            plain: list[Entry] = [(None, None), (portable, None), *((config, None) for config in configs)]
            found = measure(chain, plain, repeats)
            sound = [i for i in range(2, len(found)) if not found[i]["problem"]]
            best = [portable, *(plain[i][0] for i in sorted(sound, key=lambda i: found[i]["us"])[:3])]
            found += measure(
                chain,
                [(config, split) for config in best for split in splits_for(chain.cache.plan())],
                repeats,
            )
            floor, base = found[0]["us"], found[1]["us"]
            print(
                f"{name} {batch} x {keys}: without attention {floor:.2f}, portable + {base - floor:.2f} us",
                flush=True,
            )
            for row in sorted(found[2:], key=lambda row: row["us"]):
                print(
                    f"    {row['us']:8.2f} = + {row['us'] - floor:6.2f} {row['label']} {row['problem']}",
                    flush=True,
                )
            rows += [{"model": name, "rows": batch, "keys": keys, **row} for row in found]
            del chain
    return rows


def warm(name: str, batch: int) -> None:
    """Compile what stands around attention, and the portable kernel."""
    chain = Chain(SHAPES[name], batch, 256, 1)
    chain.run(chain.cache.portable())
    for split in (LONG_ITEMS, *splits_for(chain.cache.plan())):
        chain.cache.plan(split)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------ processes


def child(arguments: list[str], limit_s: float) -> tuple[bool, str]:
    """Run this script with other arguments. Whether it ended well and in time, and the last line that it said."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, f"HANGS, or is not done after {limit_s:.0f} s"
    lines = text.strip().splitlines()
    return process.returncode == 0, lines[-1] if lines else ""


def checked(
    configs: list[int], works: tuple[tuple[int, int], ...], models: list[str], limit_s: float
) -> list[int]:
    """Which of `CONFIGS` are sound, while what surrounds them is compiled."""
    batches = sorted({batch for batch, _ in works})
    with ThreadPoolExecutor(len(configs) + len(batches) * len(models)) as pool:
        verdicts = {i: pool.submit(child, ["--check", str(i)], limit_s) for i in configs}
        for name in models:
            for batch in batches:
                pool.submit(child, ["--warm", f"{name}:{batch}"], limit_s)
    for i, result in verdicts.items():
        good, text = result.result()
        print(f"check {label(CONFIGS[i])}: {'ok' if good else text}", flush=True)
    return [i for i in configs if verdicts[i].result()[0]]


def main() -> None:
    """Check, then time, in processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--models", default="llama8b,qwen06b")
    parser.add_argument("--works", default="", help="such as 1x256,64x384; the most important first")
    parser.add_argument("--configs", default="", help="numbers of configurations, such as 0,3 (all)")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds for everything")
    parser.add_argument("--check-limit", type=float, default=60.0, help="seconds after which a check hangs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--check", type=int, help="check this configuration in this process")
    parser.add_argument("--warm", help="compile the chain of MODEL:ROWS in this process")
    parser.add_argument("--time", help="time these configurations in this process, or none of them: -")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    works = tuple(tuple(map(int, work.split("x"))) for work in filter(None, args.works.split(","))) or WORKS
    models = args.models.split(",")
    chosen = [int(i) for i in filter(None, args.configs.split(","))] or list(range(len(CONFIGS)))
    torch.manual_seed(0)
    if args.dry_run:
        portable = DecodeConfig(16, 4, 2)
        print("check:", check(portable, TINY, True) or "ok", label(CONFIGS[2], LONG_ITEMS))
        time_all(TINY, ((2, 70),), [portable], math.inf, 1)
    elif args.check is not None:
        wrong = check(CONFIGS[args.check], SHAPES, False)
        print(wrong or "ok")
        sys.exit(1 if wrong else 0)
    elif args.warm:
        name, _, batch = args.warm.partition(":")
        warm(name, int(batch))
    elif args.time:
        configs: list[Config] = [CONFIGS[int(i)] for i in filter(None, args.time.strip("-").split(","))]
        shapes = {name: SHAPES[name] for name in models}
        rows = time_all(shapes, works, configs, start + args.budget, args.repeats)
        if args.out:
            args.out.write_text(json.dumps({"configs": [asdict(c) for c in CONFIGS], "rows": rows}, indent=1))
    else:
        sound = checked(chosen, works, models, args.check_limit)
        left = args.budget - (time.monotonic() - start)
        print(f"{len(sound)} of {len(chosen)} are sound, after {time.monotonic() - start:.0f} s", flush=True)
        command = [
            sys.executable,
            __file__,
            "--time",
            ",".join(map(str, sound)) or "-",
            "--models",
            args.models,
        ]
        command += [
            "--budget",
            str(max(5.0, left - 10)),
            "--repeats",
            str(args.repeats),
            "--works",
            args.works,
        ]
        command += ["--out", str(args.out)] if args.out else []
        try:
            subprocess.run(command, timeout=left + 30, check=False)
        except subprocess.TimeoutExpired:
            print("HANGS, ended", flush=True)
        print(f"took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
