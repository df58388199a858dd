"""Whole steps as CUDA graphs: from the row gather to the sampled token in one launch.

A graph is captured per `GraphKey`: padded numbers of entries and tokens, and how tokens are drawn. Padding entries have
no tokens, padding tokens write to the null block. All graphs share one memory pool, and are captured largest first, so
that the smaller ones fit into what the largest took: only one runs at a time.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from charonia.worker.batch import StepLayout
from charonia.worker.sampling_mode import SamplingMode

MAX_PADDING = 0.15
FREE_PADDING = 1024
"""Steps of more tokens that would be padded by a larger share are launched kernel by kernel instead."""
_MIXED_ENTRIES = (128, 512, 1024)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """num_entries, num_tokens: padded. decodes_only: every entry is a single token. shares_prefix: the entries' common
    prefix is read once for all of them.
    """

    num_entries: int
    num_tokens: int
    decodes_only: bool
    mode: SamplingMode
    shares_prefix: bool = False


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes of decode steps: fine where a step's time follows the batch, coarser above.

    From 256 on they are multiples of a matrix tile's 128 rows, or half of one: cuBLAS is slower at 448 rows than at
    512.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), 256, 320, *range(384, 1025, 128)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """Padded token counts of steps with chunks, and the token budget: full steps are not padded.

    Matrix products take 128 rows at a time in any case, and below 512 rows their time is the weights'.
    """
    sizes = [*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4097, 256)]
    return [size for size in sizes if size < max_num_tokens] + [max_num_tokens]


def dry_run_keys(max_num_seqs: int, max_num_tokens: int, shares_prefix: bool) -> list[GraphKey]:
    """Shapes that reach, between them, every kernel: one per size class of the linear layers and of the batch.

    Those with the kernels that take longest to compile come first.
    """
    keys = []
    for tokens in (max_num_tokens, 128, 96, 64):
        size = min(tokens, max_num_tokens)
        keys.append(GraphKey(min(max_num_seqs, size), size, False, SamplingMode.FILTERED))
    if shares_prefix:
        sizes = {min(size, max_num_seqs) for size in (8, 32, 256, max_num_seqs)}
        keys += [GraphKey(size, size, True, SamplingMode.PLAIN, True) for size in sizes]
    keys += [
        GraphKey(size, size, True, SamplingMode.PLAIN)
        for size in decode_sizes(max_num_seqs)
        if size <= 128 or size == max_num_seqs
    ]
    return keys


class GraphSizes:
    """Chooses the key of each step, from a bounded set of keys. Pure arithmetic: capture is `StepGraphs`' part."""

    def __init__(self, *, max_num_seqs: int, max_num_tokens: int) -> None:
        self._decode_sizes = decode_sizes(max_num_seqs)
        self._mixed_sizes = mixed_sizes(max_num_tokens)
        self._mixed_entries = [size for size in _MIXED_ENTRIES if size < max_num_seqs] + [max_num_seqs]

    def key_for(self, layout: StepLayout, mode: SamplingMode, shares_prefix: bool) -> GraphKey | None:
        """The graph that can run a step; None if it would compute too much padding."""
        entries, tokens = layout.num_entries, layout.num_tokens
        if layout.decodes_only:
            size = _at_least(self._decode_sizes, entries)
            return GraphKey(size, size, True, mode, shares_prefix)
        size = _at_least(self._mixed_sizes, tokens)
        if size > tokens * (1 + MAX_PADDING) and tokens > FREE_PADDING:
            return None
        entries = min(_at_least(self._mixed_entries, entries), size)
        return GraphKey(entries, size, False, mode, shares_prefix)

    def keys(self, mode: SamplingMode) -> list[GraphKey]:
        """Every key of a mode that shares no prefix, largest first."""
        mixed = {
            GraphKey(min(entries, tokens), tokens, False, mode)
            for tokens in self._mixed_sizes
            for entries in self._mixed_entries
        }
        decodes = {GraphKey(size, size, True, mode) for size in self._decode_sizes}
        return sorted(mixed | decodes, key=lambda key: (-key.num_tokens, -key.num_entries))


class StepGraphs:
    """Captures steps and replays them.

    run: issues the device work of a step of the key's shape, reading and writing only memory at fixed addresses.
    """

    def __init__(self, run: Callable[[GraphKey], None], sizes: GraphSizes, device: torch.device) -> None:
        self.sizes = sizes
        self._run = run
        self._graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, keys: Sequence[GraphKey]) -> None:
        """Capture the keys that are not there yet, in the order given."""
        for key in keys:
            if key not in self._graphs:
                self._graphs[key] = self._captured(key)

    def replay(self, key: GraphKey) -> None:
        """Launch a step; captured first if need be."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._captured(key)
        graph.replay()

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()
        self._pool = None

    def _captured(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Capture runs nothing, so it waits for nothing either: steps in flight go on.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._run(key)
            finally:
                graph.capture_end()
        return graph


def _at_least(sizes: Sequence[int], value: int) -> int:
    return sizes[bisect.bisect_left(sizes, value)]
