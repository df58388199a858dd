"""Time the CPU kernels beside PyTorch's own operators: ``python benchmarks/kernels_cpu.py --dtype bfloat16``.

Prints one line a case: milliseconds (the least of several repetitions, so that other load on the machine matters less),
the bandwidth or arithmetic rate that this means, and the same operation through PyTorch.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import charonia_kernels as kernels
import torch
import torch.nn.functional as F
from charonia_kernels.cpu import warm_up

SMOLLM2_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
SMOLLM2_HEAD = (49152, 576)
SMOLLM2_LAYERS = 30


@dataclass(frozen=True, slots=True)
class Case:
    """One measured operation.

    Attributes:
        name: what the table shows.
        ours: runs the kernel.
        torch: runs PyTorch's operator, or None where there is none.
        bytes: least memory traffic.
        flops: multiply-adds counted twice.
    """

    name: str
    ours: Callable[[], object]
    torch: Callable[[], object] | None
    bytes: int
    flops: int


def seconds(run: Callable[[], object], budget: float) -> float:
    """Least time of one call, over repetitions that take about ``budget`` seconds together."""
    run()
    best, deadline = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def model_case(rows: int, dtype: torch.dtype) -> Case:
    """Every projection of SmolLM2-135M, one after the other, each with weights of its own."""
    shapes = [*SMOLLM2_LAYER * SMOLLM2_LAYERS, SMOLLM2_HEAD]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs = {depth: torch.randn(rows, depth, dtype=dtype) for depth in (576, 1536)}

    def run(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    elements = sum(weight.numel() for weight in weights)
    return Case(
        f"SmolLM2-135M linears, M={rows}",
        lambda: run(kernels.linear),
        lambda: run(F.linear),
        elements * dtype.itemsize,
        2 * elements * rows,
    )


def row_cases(rows: int, dtype: torch.dtype) -> list[Case]:
    """Norms, activations and the rotary embedding of one SmolLM2-135M layer."""
    hidden, intermediate, heads, kv_heads, dim, block = 576, 1536, 9, 3, 64, 16
    x, residual = (torch.randn(rows, hidden, dtype=dtype) for _ in range(2))
    weight = torch.randn(hidden)
    gated = torch.randn(rows, 2 * intermediate, dtype=dtype)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cache = torch.zeros(2, rows // block + 2, kv_heads, block, dim, dtype=dtype)
    positions = torch.arange(rows)
    cos_sin = torch.randn(rows, dim)
    size = dtype.itemsize
    narrow = weight.to(dtype)

    def rope() -> torch.Tensor:
        slots = positions + block
        return kernels.qk_norm_rope_write(
            qkv, positions, slots, cos_sin, cache[0], cache[1], heads, kv_heads, dim
        )

    return [
        Case(
            f"rms_norm, T={rows}",
            lambda: kernels.rms_norm(x, weight, 1e-5),
            lambda: F.rms_norm(x, (hidden,), narrow, 1e-5),
            2 * x.numel() * size,
            0,
        ),
        Case(
            f"add_rms_norm, T={rows}",
            lambda: kernels.add_rms_norm(x, residual, weight, 1e-5),
            lambda: F.rms_norm(residual.add_(x), (hidden,), narrow, 1e-5),
            4 * x.numel() * size,
            0,
        ),
        Case(
            f"silu_mul, T={rows}",
            lambda: kernels.silu_mul(gated),
            lambda: F.silu(gated[:, :intermediate]) * gated[:, intermediate:],
            3 * gated.numel() // 2 * size,
            0,
        ),
        Case(f"qk_norm_rope_write, T={rows}", rope, None, 2 * qkv.numel() * size, 0),
    ]


def attention_case(name: str, lengths: list[tuple[int, int]], dtype: torch.dtype) -> Case:
    """Attention of SmolLM2-135M's shape over sequences of (queries, keys)."""
    heads, kv_heads, dim, block = 9, 3, 64, 16
    blocks = [-(-keys // block) for _, keys in lengths]
    caches = torch.randn(2, sum(blocks) + 1, kv_heads, block, dim, dtype=dtype)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    order = (torch.randperm(sum(blocks)) + 1).int()
    for row, part in enumerate(order.split(blocks)):
        table[row, : len(part)] = part
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).int()
    seq_lens = torch.tensor([keys for _, keys in lengths]).int()
    q = torch.randn(int(starts[-1]), heads, dim, dtype=dtype)
    dense = [
        (torch.randn(1, heads, n, dim, dtype=dtype), torch.randn(1, kv_heads, keys, dim, dtype=dtype))
        for n, keys in lengths
    ]

    def with_torch() -> None:
        for queries, keys in dense:
            F.scaled_dot_product_attention(
                queries, keys, keys, is_causal=queries.shape[2] == keys.shape[2], enable_gqa=True
            )

    pairs = sum(n * keys - n * (n - 1) // 2 for n, keys in lengths)
    return Case(
        f"paged_attention, {name}",
        lambda: kernels.paged_attention(q, caches[0], caches[1], table, seq_lens, starts, dim**-0.5),
        with_torch,
        2 * sum(keys for _, keys in lengths) * kv_heads * dim * dtype.itemsize,
        4 * pairs * heads * dim,
    )


def cases(dtype: torch.dtype) -> list[Case]:
    """The table, top to bottom."""
    return [
        *(model_case(rows, dtype) for rows in (1, 2, 4, 8, 16, 32, 64, 256)),
        *(case for rows in (1, 32, 512) for case in row_cases(rows, dtype)),
        attention_case("1 decode, 200 keys", [(1, 200)], dtype),
        attention_case("1 decode, 2,000 keys", [(1, 2000)], dtype),
        attention_case("32 decodes, 500 keys", [(1, 500)] * 32, dtype),
        attention_case("prefill 512", [(512, 512)], dtype),
        attention_case("prefill 2,048", [(2048, 2048)], dtype),
        attention_case("prefill 512 after 1,536", [(512, 2048)], dtype),
    ]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time a measurement (default: %(default)s)"
    )
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's operators out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    warm_up(dtype)
    print(f"{arguments.dtype}, {arguments.threads} threads")
    print(f"{'case':40} {'ours ms':>9} {'GB/s':>7} {'GFLOP/s':>8} {'torch ms':>9} {'ratio':>6}")
    with torch.inference_mode():
        for case in cases(dtype):
            if arguments.filter not in case.name:
                continue
            ours = seconds(case.ours, arguments.seconds)
            line = f"{case.name:40} {ours * 1e3:9.3f} {case.bytes / ours / 1e9:7.1f} {case.flops / ours / 1e9:8.1f}"
            if case.torch is not None and not arguments.no_torch:
                theirs = seconds(case.torch, arguments.seconds)
                line += f" {theirs * 1e3:9.3f} {theirs / ours:6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
