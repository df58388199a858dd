"""Causal attention over a paged KV cache on the CPU, decode rows and prefill chunks in one launch.

A work item is a tile of queries of one sequence against one key/value head: the query heads of the group are stacked
below each other, so that every key and value is read once for the group.

    tile rows       row r = (query r // group, head r % group), fp32, already scaled
    scores          [rows, TILE_KEYS], one tile of keys at a time
    total           [rows, head_dim] fp32, rescaled when a row's maximum grows

Single-query sequences longer than PARTITION_KEYS are split along the keys at fixed positions, and the parts combined
by a second launch. Where the cuts lie depends on the sequence alone, so its result does not depend on the batch.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import carray

from charonia_kernels.cpu._attention_tile import NEGATIVE_INFINITY, TILE_KEYS, attend
from charonia_kernels.cpu._jit import FLOAT, INT, SOURCE_DIGEST, WORK, Kernel, check_caches, jit, workers_for
from charonia_kernels.cpu._math import exp_f32
from charonia_kernels.cpu._simd import (
    claim_item,
    claim_worker,
    load,
    offset,
    pointer,
    store,
)

TILE_ROWS = 96
PARTITION_KEYS = 512
_F32 = numba.float32
_I32 = numba.int32


class _Args(ctypes.Structure):
    _fields_ = [
        *WORK,
        *(
            (name, INT)
            for name in ("q", "keys", "values", "block_table", "seq_lens", "query_start_loc", "out")
        ),
        *((name, INT) for name in ("scratch", "scratch_stride", "parts", "num_parts")),
        *((name, INT) for name in ("tokens", "sequences", "heads", "kv_heads", "head_dim", "q_stride")),
        *((name, INT) for name in ("block_size", "block_stride", "table_stride", "queries_per_tile")),
        *((name, INT) for name in ("window",)),
        ("scale", FLOAT),
        ("soft_cap", FLOAT),
    ]


@jit
def _sequence_of(token, query_start_loc, sequences):  # type: ignore[no-untyped-def]
    """The last sequence that starts at or before ``token`` (empty ones share their start with the next)."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if query_start_loc[middle] <= token:
            low = middle
        else:
            high = middle
    return low


@jit
def _stage_queries(a, q, staged, first, queries, kv_head):  # type: ignore[no-untyped-def]
    dim, group = a.head_dim, a.heads // a.kv_heads
    scale = np.float32(a.scale)
    for query in range(queries):
        source = offset(q, (first + query) * a.q_stride + kv_head * group * dim)
        target = offset(staged, query * group * dim)
        for i in range(group * dim):
            target[i] = load(source, i) * scale


@jit
def _write_rows(a, total, denominator, out, first, queries, kv_head):  # type: ignore[no-untyped-def]
    dim, group = a.head_dim, a.heads // a.kv_heads
    for query in range(queries):
        target = offset(out, ((first + query) * a.heads + kv_head * group) * dim)
        for head in range(group):
            row = query * group + head
            inverse = np.float32(0.0)
            if denominator[row] > np.float32(0.0):
                inverse = np.float32(1.0) / denominator[row]
            for i in range(dim):
                store(target, head * dim + i, total[row * dim + i] * inverse)


@jit
def _write_part(a, total, maximum, denominator, sequence, part, kv_head):  # type: ignore[no-untyped-def]
    """Keep a partition's unscaled sum, maximum and denominator: ``parts [sequences, num_parts, heads, dim + 2]``."""
    dim, group = a.head_dim, a.heads // a.kv_heads
    first = (sequence * a.num_parts + part) * a.heads + kv_head * group
    target = offset(pointer(a.parts, _F32), first * (dim + 2))
    for row in range(group):
        for i in range(dim):
            target[row * (dim + 2) + i] = total[row * dim + i]
        target[row * (dim + 2) + dim] = maximum[row]
        target[row * (dim + 2) + dim + 1] = denominator[row]


@jit
def _worker_tile(a, worker):  # type: ignore[no-untyped-def]
    """The scratch areas of one worker: (q, total, scores, turned, maximum, denominator)."""
    base = offset(pointer(a.scratch, _F32), worker * a.scratch_stride)
    rows = a.queries_per_tile * (a.heads // a.kv_heads)
    total = offset(base, rows * a.head_dim)
    scores = offset(total, rows * a.head_dim)
    turned = offset(scores, rows * TILE_KEYS)
    maximum = offset(turned, a.head_dim * TILE_KEYS)
    return base, total, scores, turned, maximum, offset(maximum, rows)


@jit
def _decode_keys(a, length):  # type: ignore[no-untyped-def]
    """First key that the last query of a sequence of this length sees."""
    return max(0, length - a.window) if a.window > 0 else 0


def _build(q_type: Any, cache_type: Any) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        q, out = pointer(a.q, q_type), pointer(a.out, q_type)
        keys, values = pointer(a.keys, cache_type), pointer(a.values, cache_type)
        lengths, starts = pointer(a.seq_lens, _I32), pointer(a.query_start_loc, _I32)
        tile = _worker_tile(a, claim_worker(args))
        while True:
            item = claim_item(args)
            if item >= a.num_items:
                break
            # The last tokens first: they see the most keys, and a long item must not be the last to start.
            first = a.tokens - 1 - item // (a.kv_heads * a.num_parts)
            kv_head, part = item // a.num_parts % a.kv_heads, item % a.num_parts
            sequence = _sequence_of(first, starts, a.sequences)
            start, stop, length = (
                np.int64(starts[sequence]),
                np.int64(starts[sequence + 1]),
                np.int64(lengths[sequence]),
            )
            single = stop - start == 1
            padding = first >= stop
            if part > 0 and (padding or not single):
                continue
            if not padding and (first - start) % a.queries_per_tile != 0:
                continue
            queries = 1 if padding else min(a.queries_per_tile, stop - first)
            position = length - stop + first
            begin = _decode_keys(a, position + 1)
            end = 0 if padding else max(0, position + queries)
            divided = single and begin // PARTITION_KEYS < (end - 1) // PARTITION_KEYS
            if divided:
                begin = max(begin, part * PARTITION_KEYS)
                end = min(end, (part + 1) * PARTITION_KEYS)
                if begin >= end:
                    continue
            elif part > 0:
                continue
            rows = queries * (a.heads // a.kv_heads)
            _stage_queries(a, q, tile[0], first, queries, kv_head)
            table = pointer(a.block_table + 4 * sequence * a.table_stride, _I32)
            attend(a, keys, values, table, tile, kv_head, rows, position, begin, end)
            if divided:
                _write_part(a, tile[1], tile[4], tile[5], sequence, part, kv_head)
            else:
                _write_rows(a, tile[1], tile[5], out, first, queries, kv_head)

    return entry


@jit
def _combine_head(a, parts, total, first, last, out):  # type: ignore[no-untyped-def]
    """Merge the partitions [first, last] of one head; ``parts`` points at partition 0."""
    dim = a.head_dim
    step = a.heads * (dim + 2)
    peak = NEGATIVE_INFINITY
    for part in range(first, last + 1):
        peak = max(peak, parts[part * step + dim])
    for i in range(dim):
        total[i] = np.float32(0.0)
    denominator = np.float32(0.0)
    for part in range(first, last + 1):
        source = offset(parts, part * step)
        factor = exp_f32(source[dim] - peak)
        denominator += factor * source[dim + 1]
        for i in range(dim):
            total[i] += factor * source[i]
    inverse = np.float32(1.0) / denominator
    for i in range(dim):
        store(out, i, total[i] * inverse)


def _build_combine(q_type: Any) -> Callable[[Any], None]:
    digest = SOURCE_DIGEST

    def entry(args):  # type: ignore[no-untyped-def]
        if digest == "":
            return
        a = carray(args, 1)[0]
        out = pointer(a.out, q_type)
        lengths, starts = pointer(a.seq_lens, _I32), pointer(a.query_start_loc, _I32)
        total = _worker_tile(a, claim_worker(args))[1]
        while True:
            sequence = claim_item(args)
            if sequence >= a.num_items:
                break
            row, length = np.int64(starts[sequence]), np.int64(lengths[sequence])
            first, last = _decode_keys(a, length) // PARTITION_KEYS, (length - 1) // PARTITION_KEYS
            if starts[sequence + 1] - row != 1 or first >= last:
                continue
            for head in range(a.heads):
                parts = pointer(
                    a.parts + 4 * (sequence * a.num_parts * a.heads + head) * (a.head_dim + 2), _F32
                )
                _combine_head(a, parts, total, first, last, offset(out, (row * a.heads + head) * a.head_dim))

    return entry


KERNEL = Kernel(_Args, _build)
COMBINE = Kernel(_Args, _build_combine)


def _check(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> None:
    """Refuse what the kernel would misread: it sees addresses only."""
    sequences, int32 = seq_lens.shape[0], torch.int32
    if not (
        seq_lens.dtype == query_start_loc.dtype == block_table.dtype == int32
        and query_start_loc.shape[0] == sequences + 1
        and block_table.shape[0] == sequences
        and block_table.stride(1) == 1
        and seq_lens.is_contiguous()
        and query_start_loc.is_contiguous()
    ):
        described = ", ".join(
            f"{name} {list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            for name, tensor in (
                ("block_table", block_table),
                ("seq_lens", seq_lens),
                ("query_start_loc", query_start_loc),
            )
        )
        raise ValueError(
            "paged_attention: index tensors must be int32, contiguous in the last dimension, with B, B and B + 1 "
            f"rows; they are {described}"
        )
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or q.shape[1] % key_cache.shape[1] != 0:
        raise ValueError(
            f"paged_attention: q {list(q.shape)}, strides {q.stride()}, does not fit {key_cache.shape[1]} KV heads"
        )
    check_caches("paged_attention", key_cache, value_cache, q.shape[2])


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch; see :func:`charonia_kernels.reference.paged_attention`.

    Args:
        q: ``[T, num_heads, head_dim]``, fp32 or bf16, heads contiguous, head_dim a multiple of 8.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, fp32 or bf16, blocks contiguous.
        value_cache: as ``key_cache``, with the same strides.
        block_table: ``[B, max_blocks]`` int32, rows contiguous.
        seq_lens: ``[B]`` int32, contiguous.
        query_start_loc: ``[B + 1]`` int32, contiguous.
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys at positions > p - sliding_window.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.

    Returns:
        ``[T, num_heads, head_dim]`` in q's dtype. Rows past ``query_start_loc[B]``, and rows that see no key, are zero.

    Raises:
        ValueError: a shape, dtype or stride is not as described.
    """
    tokens, heads, head_dim = q.shape
    sequences = seq_lens.shape[0]
    if sequences == 0 or tokens == 0:
        return torch.zeros((tokens, heads, head_dim), dtype=q.dtype)
    _check(q, key_cache, value_cache, block_table, seq_lens, query_start_loc)
    _, kv_heads, block_size, _ = key_cache.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    num_parts = 1
    if block_table.shape[1] * block_size > PARTITION_KEYS:
        num_parts = max(1, -(-int(seq_lens.max()) // PARTITION_KEYS))
    group = heads // kv_heads
    queries_per_tile = max(1, TILE_ROWS // group)
    items = tokens * kv_heads * num_parts
    threads = workers_for(tokens * heads * head_dim * 64, items)
    stride = queries_per_tile * group * (2 * head_dim + TILE_KEYS + 2) + head_dim * TILE_KEYS
    scratch = torch.empty(threads * stride, dtype=torch.float32)
    parts = torch.empty(
        sequences * num_parts * heads * (head_dim + 2) if num_parts > 1 else 0, dtype=torch.float32
    )
    args = _Args(
        0,
        0,
        items,
        q.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        stride,
        parts.data_ptr(),
        num_parts,
        tokens,
        sequences,
        heads,
        kv_heads,
        head_dim,
        q.stride(0),
        block_size,
        key_cache.stride(0),
        block_table.stride(0),
        queries_per_tile,
        sliding_window or 0,
        scale,
        soft_cap or 0.0,
    )
    KERNEL.launch((q.dtype, key_cache.dtype), args, threads)
    if num_parts > 1:
        args.next_item, args.next_worker, args.num_items = 0, 0, sequences
        combine_threads = min(threads, workers_for(sequences * num_parts * heads * head_dim, sequences))
        COMBINE.launch((q.dtype,), args, combine_threads)
    return out
