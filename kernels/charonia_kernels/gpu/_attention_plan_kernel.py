"""The kernel that fills the work lists of a step; their layout is drawn in `attention_plan.py`."""

import triton
import triton.language as tl

from charonia_kernels.gpu._launch import gdc_launch_dependents, gdc_wait


@triton.jit
def _first_above(cumulated, target, shift, BLOCK_B: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First entry whose cumulated count, 16 bits of it from bit `shift` on, is above `target`. By bisection."""
    low = tl.zeros_like(target)
    for level in tl.static_range(LEVELS):
        half = BLOCK_B >> (level + 1)
        probe = low + (half - 1)
        count = (tl.gather(cumulated, probe, 0) >> shift) & 0xFFFF
        low = tl.where(count <= target, low + half, low)
    return low


@triton.jit
def _pieces(keys, chunk, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """(Number, length) of the about equal pieces, at most `chunk` long, of so many keys; at least one piece."""
    number = tl.maximum(tl.cdiv(keys, chunk), 1)
    length = tl.cdiv(tl.cdiv(keys, number), ALIGN) * ALIGN
    length = tl.maximum(length, ALIGN)
    return tl.maximum(tl.cdiv(keys, length), 1), length


@triton.jit
def _fill_decodes(  # type: ignore[no-untyped-def]
    query_start_loc, seq_lens, rows, items, chunk, prefix, keys, decode, slot, num_slots,
    ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Records of the slots. keys: [BLOCK_B] private keys of each entry; decode: whether it is one."""
    number, _ = _pieces(keys, chunk, ALIGN)
    # Four classes of entries, whose counts share one scan: divided; longer than a half, a quarter of a chunk; others.
    rank = tl.where(number > 1, 0, tl.where(keys * 2 > chunk, 1, tl.where(keys * 4 > chunk, 2, 3)))
    packed = tl.where(decode, number.to(tl.int64) << (16 * rank).to(tl.int64), 0)
    cumulated = tl.cumsum(packed, 0)
    total = tl.sum(packed, 0)
    end0 = (total & 0xFFFF).to(tl.int32)
    end1 = end0 + ((total >> 16) & 0xFFFF).to(tl.int32)
    end2 = end1 + ((total >> 32) & 0xFFFF).to(tl.int32)
    end3 = end2 + ((total >> 48) & 0xFFFF).to(tl.int32)
    base = tl.where(slot < end0, 0, tl.where(slot < end1, end0, tl.where(slot < end2, end1, end2)))
    shift = (16 * ((slot >= end0).to(tl.int32) + (slot >= end1) + (slot >= end2))).to(tl.int64)
    used = slot < end3
    local = slot - base
    entry = _first_above(cumulated, local, shift, BLOCK_B, LEVELS)

    first = tl.load(query_start_loc + entry, mask=used, other=0)
    queries = tl.load(query_start_loc + entry + 1, mask=used, other=0) - first
    length = tl.load(seq_lens + entry, mask=used, other=0)
    row = tl.load(rows + entry, mask=used, other=0)
    own_number, own_length = _pieces(tl.maximum(length - prefix, 0), chunk, ALIGN)
    up_to = ((tl.gather(cumulated, entry, 0) >> shift) & 0xFFFF).to(tl.int32)
    index = local - (up_to - own_number)
    start = prefix + index * own_length
    end = tl.minimum(start + own_length, length)
    record = items + slot * 8
    inside = slot < num_slots
    tl.store(record, tl.where(used, entry, 0), mask=inside)
    tl.store(record + 1, row, mask=inside)
    tl.store(record + 2, first, mask=inside)
    tl.store(record + 3, queries, mask=inside)
    tl.store(record + 4, tl.where(used, start, 0), mask=inside)
    tl.store(record + 5, tl.where(used, end, 0), mask=inside)
    tl.store(record + 6, tl.where(used, slot - index, 0), mask=inside)
    tl.store(record + 7, tl.where(used, own_number, 0), mask=inside)


@triton.jit
def _fill_prefills(  # type: ignore[no-untyped-def]
    query_start_loc, seq_lens, rows, items, counts, prefill, slot, num_slots,
    TILE_TOKENS: tl.constexpr, BLOCK_B: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Records of the slots. counts: [BLOCK_B] query tokens of each entry; prefill: whether it is one."""
    tiles = tl.where(prefill, tl.cdiv(counts, TILE_TOKENS), 0)
    cumulated = tl.cumsum(tiles, 0)
    used = slot < tl.sum(tiles, 0)
    entry = _first_above(cumulated, slot, 0, BLOCK_B, LEVELS)
    # The last tokens of a sequence, which see the most keys, come first.
    before = tl.gather(cumulated, entry, 0) - slot - 1
    first = tl.load(query_start_loc + entry, mask=used, other=0)
    queries = tl.load(query_start_loc + entry + 1, mask=used, other=0) - first
    length = tl.load(seq_lens + entry, mask=used, other=0)
    row = tl.load(rows + entry, mask=used, other=0)
    skipped = tl.where(used, before * TILE_TOKENS, 0)
    record = items + slot * 4
    inside = slot < num_slots
    tl.store(record, row, mask=inside)
    tl.store(record + 1, first + skipped, mask=inside)
    tl.store(record + 2, tl.minimum(queries - skipped, TILE_TOKENS), mask=inside)
    tl.store(record + 3, length - queries + skipped, mask=inside)


@triton.jit(do_not_specialize=["batch", "decode_slots", "prefill_slots", "shared_chunks"])
def plan_kernel(  # type: ignore[no-untyped-def]
    # pointers; common_prefix_len may be None
    query_start_loc,  # [batch + 1] int32
    seq_lens,  # [batch] int32
    rows,  # [batch] int32
    common_prefix_len,  # [1] int32
    decode_items,
    prefill_items,
    counters,
    entries,
    prefix_info,
    # scalars
    batch,
    decode_slots,
    prefill_slots,
    shared_chunks,
    # constants
    HAS_DECODES: tl.constexpr,
    MAX_DECODE_QUERY_LEN: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TARGET_ITEMS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    SHARED_ALIGN: tl.constexpr,
    NUM_COUNTERS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(BLOCK_B)
    USE_PDL: tl.constexpr,
):
    """Fill SLOTS records of one list a program: decode items by the first programs, prefill items by the others."""
    gdc_wait(USE_PDL)
    gdc_launch_dependents(USE_PDL)
    program = tl.program_id(0)
    decode_programs = tl.cdiv(decode_slots, SLOTS)
    entry = tl.arange(0, BLOCK_B)
    real = entry < batch
    first = tl.load(query_start_loc + entry, mask=real, other=0)
    counts = tl.load(query_start_loc + entry + 1, mask=real, other=0) - first
    lengths = tl.load(seq_lens + entry, mask=real, other=0)
    decode = (counts > 0) & (counts <= (MAX_DECODE_QUERY_LEN if HAS_DECODES else 0))
    if program >= decode_programs:
        slot = (program - decode_programs) * SLOTS + tl.arange(0, SLOTS)
        _fill_prefills(
            query_start_loc, seq_lens, rows, prefill_items, counts, (counts > 0) & ~decode, slot,
            prefill_slots, TILE_TOKENS, BLOCK_B, LEVELS,
        )  # fmt: skip
    else:
        prefix = 0
        if common_prefix_len is not None:
            # No query may stand inside the prefix.
            nearest = tl.min(tl.where(decode, lengths - counts, 2147483647), 0)
            prefix = tl.minimum(tl.load(common_prefix_len), nearest)
            prefix = tl.where(nearest == 2147483647, 0, tl.maximum(prefix, 0) // BLOCK_SIZE * BLOCK_SIZE)
        keys = tl.where(decode, tl.maximum(lengths - prefix, 0), 0)
        chunk = tl.cdiv(tl.cdiv(tl.sum(keys, 0), TARGET_ITEMS), ALIGN) * ALIGN
        chunk = tl.maximum(chunk, MIN_CHUNK)
        slot = program * SLOTS + tl.arange(0, SLOTS)
        _fill_decodes(
            query_start_loc, seq_lens, rows, decode_items, chunk, prefix, keys, decode, slot,
            decode_slots, ALIGN, BLOCK_B, LEVELS,
        )  # fmt: skip
        if program == 0:
            for start in tl.range(0, NUM_COUNTERS, SLOTS):
                index = start + tl.arange(0, SLOTS)
                tl.store(counters + index, tl.zeros([SLOTS], tl.int32), mask=index < NUM_COUNTERS)
            if common_prefix_len is not None:
                tl.store(entries + entry * 4, first, mask=real)
                tl.store(entries + entry * 4 + 1, tl.where(decode, counts, 0), mask=real)
                tl.store(entries + entry * 4 + 2, lengths - counts, mask=real)
                one = tl.min(tl.where(decode, entry, BLOCK_B), 0)
                shared_chunk = tl.cdiv(tl.cdiv(prefix, shared_chunks), SHARED_ALIGN) * SHARED_ALIGN
                tl.store(prefix_info, prefix)
                tl.store(prefix_info + 1, tl.load(rows + one, mask=one < BLOCK_B, other=0))
                tl.store(prefix_info + 2, shared_chunk)
                tl.store(prefix_info + 3, tl.cdiv(prefix, tl.maximum(shared_chunk, 1)))
