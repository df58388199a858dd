"""Device-resident request state: staged writes into it, a step's inputs out of it, a step's tokens into it.

All state lives in one int32 tensor, the arena, whose parts are views: row r of ``token_ids [R, L]``, ``block_table
[R, NB]`` and ``num_computed [R]`` belongs to one request. A step has B entries, each one row's tokens of that step;
entry b's tokens are ``query_start_loc[b] .. query_start_loc[b + 1] - 1`` of the flat batch. B and T are padded: entries
without tokens sit at the end, and so do the tokens past ``query_start_loc[B]``.

Where the views begin in the arena is nobody's concern: no kernel here specialises on an address or on a count.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits

WRITE_BLOCK = 1024
STEP_BLOCK = 128


@dataclass(frozen=True, slots=True)
class WriteConfig:
    """splits: programs that share a segment, chunk by chunk in turn."""

    splits: int
    use_pdl: bool


def write_config(num_segments: int, payload: int, device: DeviceTraits) -> WriteConfig:
    """Launch parameters for segments of `payload` words together: long ones are split while SMs would be idle."""
    most = max(4 * device.num_sms // max(num_segments, 1), 1)
    return WriteConfig(max(min(triton.cdiv(payload, WRITE_BLOCK), most), 1), device.has_pdl)


@triton.jit(do_not_specialize_on_alignment=["arena", "staged"])
def apply_writes_kernel(  # type: ignore[no-untyped-def]
    # pointers
    arena,
    staged,
    # constants
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (s, i) copies chunks i, i + splits, i + 2 * splits, ... of segment s."""
    gdc_launch_dependents(USE_PDL)
    record = staged + 3 * tl.program_id(0)
    gdc_wait(USE_PDL)
    target = arena + tl.load(record)
    source = staged + tl.load(record + 1)
    length = tl.load(record + 2)
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(source + places, mask=places < length)
        tl.store(target + places, values, mask=places < length)


@triton.jit(
    do_not_specialize=["num_tokens", "num_entries", "search_steps", "token_stride", "block_stride", "max_tokens"],
    do_not_specialize_on_alignment=[
        "rows", "query_start_loc", "num_computed", "token_ids", "block_table",
        "input_ids", "positions", "slot_mapping", "seq_lens",
    ],
)  # fmt: skip
def prepare_step_kernel(  # type: ignore[no-untyped-def]
    # pointers
    rows,
    query_start_loc,
    num_computed,
    token_ids,
    block_table,
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    # scalars
    num_tokens,
    num_entries,
    search_steps,
    token_stride,
    block_stride,
    max_tokens,
    # constants
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BLOCK tokens, and as many entries. search_steps: halvings that reduce num_entries to one."""
    gdc_launch_dependents(USE_PDL)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait(USE_PDL)
    is_token = item < tl.minimum(tl.load(query_start_loc + num_entries), num_tokens)
    # query_start_loc[entry] <= item < query_start_loc[end]
    entry = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32) + num_entries
    for _ in range(search_steps):
        middle = (entry + end) // 2
        begins_before = tl.load(query_start_loc + middle) <= item
        entry = tl.where(begins_before, middle, entry)
        end = tl.where(begins_before, end, middle)
    row = tl.load(rows + entry, mask=is_token, other=0)
    begin = tl.load(query_start_loc + entry)
    position = tl.load(num_computed + row, mask=is_token, other=0) + item - begin
    known = is_token & (position < max_tokens)
    place = row.to(tl.int64)
    token = tl.load(token_ids + place * token_stride + position, mask=known, other=0)
    block = tl.load(block_table + place * block_stride + position // BLOCK_SIZE, mask=known, other=0)
    is_inside = item < num_tokens
    tl.store(input_ids + item, token, mask=is_inside)
    tl.store(positions + item, tl.where(is_token, position, 0), mask=is_inside)
    slot = tl.where(known, block * BLOCK_SIZE + position % BLOCK_SIZE, 0)
    tl.store(slot_mapping + item, slot, mask=is_inside)

    is_entry = item < num_entries
    length = tl.load(query_start_loc + item + 1, mask=is_entry, other=0)
    length -= tl.load(query_start_loc + item, mask=is_entry, other=0)
    has_tokens = is_entry & (length > 0)
    entry_row = tl.load(rows + item, mask=has_tokens, other=0)
    seq_len = tl.load(num_computed + entry_row, mask=has_tokens, other=0) + length
    tl.store(seq_lens + item, tl.where(has_tokens, seq_len, 0), mask=is_entry)


@triton.jit(
    do_not_specialize=["num_entries", "token_stride", "max_tokens"],
    do_not_specialize_on_alignment=[
        "rows", "query_start_loc", "seq_lens", "samples", "tokens", "num_computed", "token_ids",
    ],
)  # fmt: skip
def append_tokens_kernel(  # type: ignore[no-untyped-def]
    # pointers
    rows,
    query_start_loc,
    seq_lens,
    samples,
    tokens,
    num_computed,
    token_ids,
    # scalars
    num_entries,
    token_stride,
    max_tokens,
    # constants
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BLOCK entries."""
    gdc_launch_dependents(USE_PDL)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    gdc_wait(USE_PDL)
    begin = tl.load(query_start_loc + entry, mask=inside, other=0)
    has_tokens = inside & (tl.load(query_start_loc + entry + 1, mask=inside, other=0) > begin)
    row = tl.load(rows + entry, mask=has_tokens, other=0)
    seq_len = tl.load(seq_lens + entry, mask=has_tokens, other=0)
    does_sample = tl.load(samples + entry, mask=has_tokens, other=0) != 0
    token = tl.load(tokens + entry, mask=has_tokens, other=0).to(tl.int32)
    tl.store(num_computed + row, seq_len, mask=has_tokens)
    place = token_ids + row.to(tl.int64) * token_stride + seq_len
    tl.store(place, token, mask=has_tokens & does_sample & (seq_len < max_tokens))


def apply_writes(
    arena: torch.Tensor, staged: torch.Tensor, num_segments: int, *, config: WriteConfig | None = None
) -> None:
    """Copy staged segments into the arena; see :func:`charonia_kernels.reference.rows.apply_writes`.

    Args:
        arena: ``[N]`` int32, ``N < 2**31``, contiguous, written in place.
        staged: ``[M]`` int32, contiguous: ``num_segments`` records (dest, src, length), then what they point to.
            Segments do not overlap in the arena.
        num_segments: number of records.
        config: launch parameters; by default :func:`write_config`'s.

    Raises:
        ValueError: staged is shorter than its records, or a dtype is not as described.
    """
    payload = staged.shape[0] - 3 * num_segments
    if payload < 0 or arena.dtype != torch.int32 or staged.dtype != torch.int32:
        raise ValueError(
            f"apply_writes: {num_segments} records do not fit staged {list(staged.shape)} {staged.dtype}, or arena "
            f"{arena.dtype} is not int32"
        )
    if num_segments == 0:
        return
    if config is None:
        config = write_config(num_segments, payload, traits(arena.device))
    apply_writes_kernel[(num_segments, config.splits)](
        arena,
        staged,
        BLOCK=WRITE_BLOCK,
        USE_PDL=config.use_pdl,
        num_warps=4,
        launch_pdl=config.use_pdl,
    )


def _check_entries(op: str, rows: torch.Tensor, query_start_loc: torch.Tensor, *others: torch.Tensor) -> int:
    """B. `others` are [B] too."""
    entries = rows.shape[0]
    if query_start_loc.shape[0] != entries + 1 or any(other.shape[0] != entries for other in others):
        lengths = [tensor.shape[0] for tensor in (rows, query_start_loc, *others)]
        raise ValueError(
            f"{op}: lengths of rows, query_start_loc and what goes with them do not fit: {lengths}"
        )
    return entries


def prepare_step(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    use_pdl: bool | None = None,
) -> None:
    """A step's inputs from the rows; see :func:`charonia_kernels.reference.rows.prepare_step`.

    Args:
        rows: ``[B]`` int32, row of each entry; not read for entries without tokens.
        query_start_loc: ``[B + 1]`` int32.
        num_computed: ``[R]`` int32, tokens whose keys and values are cached.
        token_ids: ``[R, L]`` int32, rows may be strided.
        block_table: ``[R, NB]`` int32, rows may be strided.
        block_size: tokens of a KV block.
        input_ids: ``[T]`` int32, written.
        positions: ``[T]`` int32, written.
        slot_mapping: ``[T]`` int32, written.
        seq_lens: ``[B]`` int32, written.
        use_pdl: launch as a programmatic dependent; by default where the device can.

    Raises:
        ValueError: lengths do not fit.
    """
    entries = _check_entries("prepare_step", rows, query_start_loc, seq_lens)
    tokens = input_ids.shape[0]
    if positions.shape[0] != tokens or slot_mapping.shape[0] != tokens:
        raise ValueError(
            f"prepare_step: input_ids, positions and slot_mapping differ in length: {tokens}, {positions.shape[0]}, "
            f"{slot_mapping.shape[0]}"
        )
    programs = triton.cdiv(max(tokens, entries), STEP_BLOCK)
    if programs == 0:
        return
    if use_pdl is None:
        use_pdl = traits(token_ids.device).has_pdl
    prepare_step_kernel[(programs,)](
        rows,
        query_start_loc,
        num_computed,
        token_ids,
        block_table,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        tokens,
        entries,
        max(entries - 1, 0).bit_length(),
        token_ids.stride(0),
        block_table.stride(0),
        min(token_ids.shape[1], block_table.shape[1] * block_size),
        BLOCK_SIZE=block_size,
        BLOCK=STEP_BLOCK,
        USE_PDL=use_pdl,
        num_warps=STEP_BLOCK // 32,
        launch_pdl=use_pdl,
    )


def append_tokens(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    samples: torch.Tensor,
    tokens: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    use_pdl: bool | None = None,
) -> None:
    """Move the rows on by a step; see :func:`charonia_kernels.reference.rows.append_tokens`.

    Args:
        rows: ``[B]`` int32, row of each entry; not read for entries without tokens.
        query_start_loc: ``[B + 1]`` int32.
        seq_lens: ``[B]`` int32, as :func:`prepare_step` wrote them.
        samples: ``[B]`` int32, whether the entry has drawn a token.
        tokens: ``[B]`` int32 or int64, what it has drawn.
        num_computed: ``[R]`` int32, written.
        token_ids: ``[R, L]`` int32, written; rows may be strided.
        use_pdl: launch as a programmatic dependent; by default where the device can.

    Raises:
        ValueError: lengths do not fit.
    """
    entries = _check_entries("append_tokens", rows, query_start_loc, seq_lens, samples, tokens)
    if entries == 0:
        return
    if use_pdl is None:
        use_pdl = traits(token_ids.device).has_pdl
    append_tokens_kernel[(triton.cdiv(entries, STEP_BLOCK),)](
        rows,
        query_start_loc,
        seq_lens,
        samples,
        tokens,
        num_computed,
        token_ids,
        entries,
        token_ids.stride(0),
        token_ids.shape[1],
        BLOCK=STEP_BLOCK,
        USE_PDL=use_pdl,
        num_warps=STEP_BLOCK // 32,
        launch_pdl=use_pdl,
    )
