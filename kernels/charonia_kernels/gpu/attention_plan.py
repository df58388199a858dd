"""What attention does in a step: work lists that one kernel fills at the step's start and every layer reads.

A batch entry whose few query tokens fit the decode kernel is cut along its keys into decode items; the others are cut
along their query tokens into prefill items. All decode items of a step are about equally long, whatever the mix of
context lengths: the chunk length is ``total decode keys / target_items``, so one long sequence becomes many items and
a short one stays whole. There are at most ``batch + target_items`` items, and those of divided entries number at most
``2 * target_items``, which bounds the workspace of their partial results.

    decode_items  [n, 8]  entry, table row, first query token, query tokens, key start, key end, first item of the
                          entry, items of the entry (0: nothing to do)
    prefill_items [n, 4]  table row, first query token, query tokens (0: nothing to do), position of the first

Divided entries come first in ``decode_items``, then whole ones by falling length class: what takes long starts early.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from charonia_kernels.gpu._attention_plan_kernel import plan_kernel
from charonia_kernels.gpu._launch import DeviceTraits, traits
from charonia_kernels.gpu.attention_prefill import prefill_tile_tokens

MAX_BATCH = 1024
SLOTS = 256
"""Work items that one program of the kernel fills."""


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """How the keys of decodes are divided.

    target_items: items that the step's decode keys make at least when no chunk is shorter than min_chunk. align: chunks
    are multiples of it, and it of the block size. shared_rows: packed query rows of a tile of the shared-prefix kernel.
    """

    target_items: int
    min_chunk: int
    align: int
    shared_rows: int


SMALL_BATCH = 8
"""Up to so many entries the device is never full of them: what counts is how soon the last item is done."""


def split_config(
    num_kv_heads: int, block_size: int, device: DeviceTraits, batch: int = MAX_BATCH
) -> SplitConfig:
    """Four programs a multiprocessor, heads included, when there are keys enough; two for small batches, whose items
    may be shorter too.
    """
    align = max(64, block_size)
    small = batch <= SMALL_BATCH
    programs = (2 if small else 4) * device.num_sms
    return SplitConfig(max(1, -(-programs // num_kv_heads)), align if small else 256, align, 128)


def shared_chunks(
    batch: int, rows_per_entry: int, num_kv_heads: int, split: SplitConfig, num_sms: int
) -> int:
    """Chunks of a shared prefix, for about one program a multiprocessor."""
    tiles = -(-batch * rows_per_entry // split.shared_rows) * num_kv_heads
    return max(1, min(64, round(num_sms / tiles))) if tiles else 1


@dataclass(frozen=True, slots=True)
class Workspace:
    """Device buffers of a plan. They are shared by all sizes, layers and graphs: steps run one after the other.

    R is ``num_heads // num_kv_heads * max_decode_query_len``, the query rows of an entry for one key/value head.

    decode_items, prefill_items: the work lists, int32. counters: ``[2 * target_items, num_kv_heads]`` int32, how many
    items of the entry that starts with this item are done; zero between kernels. partial_out: ``[2 * target_items,
    num_kv_heads, R, head_dim]`` fp32, sums not yet divided. partial_stats: ``[2 * target_items, num_kv_heads, 2, R]``
    fp32, maximum (base 2) and denominator. entries: ``[max_batch, 4]`` int32: first query token, query tokens (0: not a
    decode), position of the first, nothing. prefix: ``[4]`` int32: keys of the shared prefix (0: none), a table row
    that has it, keys of a chunk, chunks. shared_out, shared_stats: as the partial ones, but with ``chunk * batch +
    entry`` in the first dimension; empty without cascade.
    """

    decode_items: torch.Tensor
    prefill_items: torch.Tensor
    counters: torch.Tensor
    partial_out: torch.Tensor
    partial_stats: torch.Tensor
    entries: torch.Tensor
    prefix: torch.Tensor
    shared_out: torch.Tensor
    shared_stats: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Buffers and what the host knows of a step. Grids depend on nothing else, so graphs can replay them.

    batch: entries, padding included. tokens: flat query tokens, padding included. has_decodes: some entry may have at
    most max_decode_query_len query tokens; without it all entries are prefills. has_prefills: some entry may have more.
    has_cascade: the decodes may share a prefix, whose length is on the device. split: how keys are divided;
    small_split: in batches of up to `SMALL_BATCH` entries. only_newest_key_is_new: every entry has one query token, and
    all keys that it sees but that token's own were written by earlier steps.
    """

    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_decode_query_len: int
    tile_tokens: int
    has_decodes: bool
    has_prefills: bool
    has_cascade: bool
    split: SplitConfig
    small_split: SplitConfig
    workspace: Workspace
    only_newest_key_is_new: bool = False

    @classmethod
    def allocate(
        cls,
        max_batch: int,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device,
        max_decode_query_len: int = 1,
        has_cascade: bool = False,
        split: SplitConfig | None = None,
    ) -> "AttentionPlan":
        """A plan for the largest batch.

        Args:
            max_batch: most entries of a step, at most 1024.
            max_tokens: most query tokens of a step.
            num_heads: query heads, a multiple of num_kv_heads.
            num_kv_heads: key/value heads.
            head_dim: of queries, keys and values.
            block_size: keys of a cache block.
            device: where the buffers are.
            max_decode_query_len: entries with at most so many query tokens are decodes; 1 to 8.
            has_cascade: whether shared prefixes may be used; takes a workspace of its own.
            split: instead of what `split_config` finds best.
        """
        small_split = split or split_config(num_kv_heads, block_size, traits(device), SMALL_BATCH)
        split = split or split_config(num_kv_heads, block_size, traits(device))
        _check(max_batch, num_heads, num_kv_heads, block_size, max_decode_query_len, split)
        tile_tokens = prefill_tile_tokens(num_heads, num_kv_heads, head_dim)
        rows = num_heads // num_kv_heads * max_decode_query_len
        slots = 2 * split.target_items
        shared = 0
        if has_cascade:
            sms = traits(device).num_sms
            shared = max(
                batch * shared_chunks(batch, rows, num_kv_heads, split, sms)
                for batch in range(1, max_batch + 1)
            )

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        workspace = Workspace(
            decode_items=zeros(max_batch + split.target_items, 8),
            prefill_items=zeros(_prefill_slots(max_batch, max_tokens, tile_tokens), 4),
            counters=zeros(slots, num_kv_heads),
            partial_out=zeros(slots, num_kv_heads, rows, head_dim, dtype=torch.float32),
            partial_stats=zeros(slots, num_kv_heads, 2, rows, dtype=torch.float32),
            entries=zeros(max_batch, 4),
            prefix=zeros(4),
            shared_out=zeros(shared, num_kv_heads, rows, head_dim, dtype=torch.float32),
            shared_stats=zeros(shared, num_kv_heads, 2, rows, dtype=torch.float32),
        )
        return cls(
            max_batch, max_tokens, num_heads, num_kv_heads, head_dim, block_size, max_decode_query_len, tile_tokens,
            True, True, has_cascade, split, small_split, workspace,
        )  # fmt: skip

    def sized(
        self,
        batch: int,
        tokens: int,
        has_decodes: bool,
        has_prefills: bool,
        has_cascade: bool = False,
        only_newest_key_is_new: bool = False,
    ) -> "AttentionPlan":
        """The same buffers for a smaller step."""
        space = self.workspace
        if not 0 <= batch <= space.entries.shape[0]:
            raise ValueError(f"attention plan: {batch} entries, allocated for {space.entries.shape[0]}")
        if _prefill_slots(batch, tokens, self.tile_tokens) > space.prefill_items.shape[0]:
            raise ValueError(
                f"attention plan: {tokens} tokens of {batch} entries are more than allocated for"
            )
        if has_cascade and not space.shared_out.shape[0]:
            raise ValueError("attention plan: allocated without has_cascade")
        return replace(
            self, batch=batch, tokens=tokens, has_decodes=has_decodes, has_prefills=has_prefills,
            has_cascade=has_cascade and has_decodes, split=self.small_split if batch <= SMALL_BATCH else self.split,
            only_newest_key_is_new=only_newest_key_is_new and not has_prefills,
        )  # fmt: skip

    @property
    def rows_per_entry(self) -> int:
        """Query rows that an entry may have for one key/value head."""
        return self.num_heads // self.num_kv_heads * self.max_decode_query_len

    @property
    def decode_slots(self) -> int:
        """Items that the decode kernel is launched for."""
        return self.batch + self.split.target_items if self.has_decodes and self.batch else 0

    @property
    def prefill_slots(self) -> int:
        """Items that the prefill kernel is launched for."""
        return _prefill_slots(self.batch, self.tokens, self.tile_tokens) if self.has_prefills else 0

    def shared_chunks(self, num_sms: int) -> int:
        """Most chunks of the shared prefix."""
        return shared_chunks(self.batch, self.rows_per_entry, self.num_kv_heads, self.split, num_sms)


def _prefill_slots(batch: int, tokens: int, tile_tokens: int) -> int:
    return min(tokens, tokens // tile_tokens + batch) if batch else 0


def _check(
    max_batch: int, num_heads: int, num_kv_heads: int, block_size: int, max_query_len: int, split: SplitConfig
) -> None:
    if not 0 < max_batch <= MAX_BATCH:
        raise ValueError(f"attention plan: max_batch {max_batch} is not from 1 to {MAX_BATCH}")
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= 16:
        raise ValueError(f"attention plan: {num_heads} heads are not 1 to 16 times {num_kv_heads} KV heads")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"attention plan: block_size {block_size} is not a power of two from 16 to 128")
    if not 1 <= max_query_len <= 8:
        raise ValueError(f"attention plan: max_decode_query_len {max_query_len} is not from 1 to 8")
    if split.align % block_size or split.min_chunk % split.align or not 1 <= split.target_items <= 16384:
        raise ValueError(f"attention plan: {split} does not fit blocks of {block_size}")


def build_plan(
    plan: AttentionPlan,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    common_prefix_len: torch.Tensor | None = None,
) -> None:
    """Fill the work lists of a step, in one launch.

    An entry with more than max_decode_query_len query tokens is nobody's work in a plan without has_prefills.

    Args:
        plan: of the step's size.
        query_start_loc: ``[batch + 1]`` int32, first query token of each entry; padding entries have none.
        seq_lens: ``[batch]`` int32, keys of each entry, this step's included.
        rows: ``[batch]`` int32, the row of the block table that each entry uses.
        common_prefix_len: ``[1]`` int32, a multiple of the block size: keys that all decode entries share, 0 for none;
            no more of it is used than lies before all of their queries. Only read with has_cascade.
    """
    batch = plan.batch
    if batch == 0:
        return
    _check_indices(
        (query_start_loc, seq_lens, rows), ("query_start_loc", "seq_lens", "rows"), (batch + 1, batch, batch)
    )
    if plan.has_cascade and common_prefix_len is None:
        raise ValueError("build_plan: a plan with has_cascade needs common_prefix_len")
    space, split, device = plan.workspace, plan.split, traits(seq_lens.device)
    decode_slots, prefill_slots = plan.decode_slots, plan.prefill_slots
    programs = -(-decode_slots // SLOTS) + -(-prefill_slots // SLOTS)
    if programs == 0:
        return
    levels = 5 if batch <= 32 else 8 if batch <= 256 else 10
    plan_kernel[(programs,)](
        query_start_loc,
        seq_lens,
        rows,
        common_prefix_len if plan.has_cascade else None,
        space.decode_items,
        space.prefill_items,
        space.counters,
        space.entries,
        space.prefix,
        batch,
        decode_slots,
        prefill_slots,
        plan.shared_chunks(device.num_sms),
        HAS_DECODES=plan.has_decodes,
        MAX_DECODE_QUERY_LEN=plan.max_decode_query_len,
        TILE_TOKENS=plan.tile_tokens,
        BLOCK_SIZE=plan.block_size,
        TARGET_ITEMS=split.target_items,
        MIN_CHUNK=split.min_chunk,
        ALIGN=split.align,
        SHARED_ALIGN=max(128, plan.block_size),
        NUM_COUNTERS=space.counters.numel(),
        SLOTS=SLOTS,
        BLOCK_B=1 << levels,
        LEVELS=levels,
        USE_PDL=device.has_pdl,
        num_warps=8,
        launch_pdl=device.has_pdl,
    )


def _check_indices(tensors: Sequence[torch.Tensor], names: Sequence[str], sizes: Sequence[int]) -> None:
    for tensor, name, size in zip(tensors, names, sizes, strict=True):
        if tensor.dtype != torch.int32 or tensor.shape[0] < size or not tensor.is_contiguous():
            raise ValueError(
                f"build_plan: {name} must be contiguous int32 of at least {size}: {tensor.dtype} {list(tensor.shape)}"
            )
