"""Device-resident request state: staged writes into it, a step's inputs out of it, a step's tokens into it.

All state lives in one int32 tensor, the arena, whose parts are views: row r of ``token_ids [R, L]``, ``block_table
[R, NB]`` and ``num_computed [R]`` belongs to one request. A step has B entries, each one row's tokens of that step;
entry b's tokens are ``query_start_loc[b] .. query_start_loc[b + 1] - 1`` of the flat batch. B and T are padded: entries
without tokens sit at the end, and so do the tokens past ``query_start_loc[B]``.
"""

import torch


def apply_writes(arena: torch.Tensor, staged: torch.Tensor, num_segments: int) -> None:
    """Copy ``staged[src : src + length]`` to ``arena[dest : dest + length]`` for every record.

    Args:
        arena: ``[N]`` int32, written in place.
        staged: ``[M]`` int32: ``num_segments`` records (dest, src, length), then what they point to. Segments do not
            overlap in the arena.
        num_segments: number of records.
    """
    if num_segments == 0:
        return
    target, source, length = staged[: 3 * num_segments].view(num_segments, 3).long().unbind(1)
    segment = torch.arange(num_segments, device=arena.device).repeat_interleave(length)
    offset = torch.arange(segment.shape[0], device=arena.device) - (length.cumsum(0) - length)[segment]
    arena[target[segment] + offset] = staged[source[segment] + offset]


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
) -> None:
    """A step's inputs from the rows.

    Token t of entry b has ``position = num_computed[row] + t - query_start_loc[b]``, the id found there, and the KV
    slot ``block_table[row, position // block_size] * block_size + position % block_size``. Tokens of no entry have id,
    position and slot 0. A position past the row's end has id 0 and slot 0, which is in the null block.

    Args:
        rows: ``[B]`` int32, row of each entry; not read for entries without tokens.
        query_start_loc: ``[B + 1]`` int32.
        num_computed: ``[R]`` int32, tokens whose keys and values are cached.
        token_ids: ``[R, L]`` int32.
        block_table: ``[R, NB]`` int32.
        block_size: tokens of a KV block.
        input_ids: ``[T]`` int32, written.
        positions: ``[T]`` int32, written.
        slot_mapping: ``[T]`` int32, written.
        seq_lens: ``[B]`` int32, written: ``num_computed[row]`` and this step's tokens; 0 for entries without tokens.
    """
    lengths = query_start_loc.diff()
    has_tokens = lengths > 0
    row_of_entry = torch.where(has_tokens, rows, 0)
    seq_lens.copy_(torch.where(has_tokens, num_computed[row_of_entry] + lengths, 0))
    for out in (input_ids, positions, slot_mapping):
        out.zero_()
    item = torch.arange(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
    item = item[item < query_start_loc[-1]]
    entry = torch.searchsorted(query_start_loc[1:].contiguous(), item, right=True)
    row = row_of_entry[entry]
    position = num_computed[row] + item - query_start_loc[entry]
    positions[: len(item)] = position
    max_tokens = min(token_ids.shape[1], block_table.shape[1] * block_size)
    known, place = position < max_tokens, position.clamp(max=max_tokens - 1)
    input_ids[: len(item)] = torch.where(known, token_ids[row, place], 0)
    slot = block_table[row, place // block_size] * block_size + place % block_size
    slot_mapping[: len(item)] = torch.where(known, slot, 0)


def append_tokens(
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    samples: torch.Tensor,
    tokens: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Move the rows on by a step: ``num_computed[row] = seq_len``, and ``token_ids[row, seq_len] = token``.

    Entries without tokens change nothing; entries that do not sample, and those whose row is full, append nothing.

    Args:
        rows: ``[B]`` int32, row of each entry, distinct; not read for entries without tokens.
        query_start_loc: ``[B + 1]`` int32.
        seq_lens: ``[B]`` int32, as :func:`prepare_step` wrote them.
        samples: ``[B]`` int32, whether the entry has drawn a token.
        tokens: ``[B]`` int32 or int64, what it has drawn.
        num_computed: ``[R]`` int32, written.
        token_ids: ``[R, L]`` int32, written.
    """
    has_tokens = query_start_loc.diff() > 0
    num_computed[rows[has_tokens]] = seq_lens[has_tokens]
    appends = has_tokens & (samples != 0) & (seq_lens < token_ids.shape[1])
    token_ids[rows[appends], seq_lens[appends]] = tokens[appends].to(torch.int32)
