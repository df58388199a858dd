"""Steps as CUDA graphs, all captured before the first request.

A step of single tokens is one graph, from the row gather to the drawn token. Any other step, and one whose drawing the
host has a part in, is a graph up to the hidden states; then tokens are drawn kernel by kernel, which takes the host
less time than the device needs for the rest. Padding entries have no tokens, padding tokens write to the null block.
All graphs share one memory pool, and are captured largest first, so that the smaller ones fit into what the largest
took: only one runs at a time.
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
_SHARING_SIZES = (8, 32, 64, 128, 256, 512)
DRAWN_IN_GRAPHS = (SamplingMode.PLAIN, SamplingMode.FILTERED)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """num_entries, num_tokens: padded. mode: how the graph draws, if it is a whole step of single tokens; None: it ends
    with the hidden states. shares_prefix: the entries' common prefix is read once for all of them.
    """

    num_entries: int
    num_tokens: int
    mode: SamplingMode | None = None
    shares_prefix: bool = False

    @property
    def decodes_only(self) -> bool:
        """Whether every entry is a single token that samples."""
        return self.mode is not None


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes of decode steps: fine where a step's time follows the batch, coarser above.

    From 256 on they are multiples of a matrix tile's 128 rows, or half of one: cuBLAS is slower at 448 rows than at
    512.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), 256, 320, *range(384, 1025, 128)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """Padded token counts of steps that are not graphs as a whole, and the token budget: full steps are not padded.

    The smallest are for a few rows whose tokens the host has a part in drawing, step after step.
    Matrix products take 128 rows at a time in any case, and below 512 rows their time is the weights'. All sizes below
    512 are decode sizes too: entries, of which there are no more than tokens, are drawn in sizes that graphs have.
    """
    sizes = [1, 2, 4, 8, 16, 32, *range(64, 385, 64), *range(512, 2048, 128), *range(2048, 4097, 256)]
    return [size for size in sizes if size < max_num_tokens] + [max_num_tokens]


def sharing_sizes(max_num_seqs: int) -> list[int]:
    """As `decode_sizes`, for steps that share a prefix."""
    return [size for size in _SHARING_SIZES if size < max_num_seqs] + [max_num_seqs]


def dry_run_keys(max_num_seqs: int, max_num_tokens: int, shares_prefix: bool) -> list[GraphKey]:
    """Shapes that reach, between them, every kernel: one per size class of the linear layers and of the batch.

    Those with the kernels that take longest to compile come first.
    """
    keys = []
    for tokens in (max_num_tokens, 128, 96, 64):
        size = min(tokens, max_num_tokens)
        keys.append(GraphKey(min(max_num_seqs, size), size))
    classes = [min(size, max_num_seqs) for size in (max_num_seqs, 128, 96, 64)]
    keys += [GraphKey(size, size, SamplingMode.FILTERED) for size in classes]
    if shares_prefix:
        keys += [GraphKey(size, size, SamplingMode.PLAIN, True) for size in sharing_sizes(max_num_seqs)]
    keys += [
        GraphKey(size, size, SamplingMode.PLAIN)
        for size in decode_sizes(max_num_seqs)
        if size <= 128 or size == max_num_seqs
    ]
    return keys


class GraphSizes:
    """Chooses the key of each step, from a bounded set of keys. Pure arithmetic: capture is `StepGraphs`' part."""

    def __init__(self, *, max_num_seqs: int, max_num_tokens: int, shares_prefix: bool) -> None:
        self._decode_sizes = decode_sizes(max_num_seqs)
        self._sharing_sizes = sharing_sizes(max_num_seqs) if shares_prefix else []
        self._mixed_sizes = mixed_sizes(max_num_tokens)
        self._mixed_entries = [size for size in _MIXED_ENTRIES if size < max_num_seqs] + [max_num_seqs]

    def key_for(self, layout: StepLayout, mode: SamplingMode, shares_prefix: bool) -> GraphKey | None:
        """The graph that can run a step; None if it would compute too much padding."""
        entries, tokens = layout.num_entries, layout.num_tokens
        if layout.decodes_only and mode in DRAWN_IN_GRAPHS:
            size = _at_least(self._sharing_sizes if shares_prefix else self._decode_sizes, entries)
            return GraphKey(size, size, mode, shares_prefix)
        size = _at_least(self._mixed_sizes, tokens)
        if size > tokens * (1 + MAX_PADDING) and tokens > FREE_PADDING:
            return None
        return GraphKey(min(_at_least(self._mixed_entries, entries), size), size)

    def entries_drawn(self, key: GraphKey, layout: StepLayout) -> int:
        """Entries of which logits are computed behind a graph that ends with hidden states: as many as without those
        rows that the host has a part in, which are to change nothing for the others.
        """
        if layout.decodes_only:
            return _at_least(self._decode_sizes, layout.num_entries)
        return key.num_entries

    def keys(self) -> list[GraphKey]:
        """Every key, largest first."""
        found = {
            GraphKey(min(entries, tokens), tokens)
            for tokens in self._mixed_sizes
            for entries in self._mixed_entries
        }
        for mode in DRAWN_IN_GRAPHS:
            found |= {GraphKey(size, size, mode) for size in self._decode_sizes}
            found |= {GraphKey(size, size, mode, True) for size in self._sharing_sizes}
        return sorted(found, key=_largest_first)


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
        """Capture the keys, in the order given."""
        for key in keys:
            self._graphs[key] = self._captured(key)

    def replay(self, key: GraphKey) -> None:
        """Launch a step of a captured key."""
        self._graphs[key].replay()

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


def _largest_first(key: GraphKey) -> tuple[int, ...]:
    return -key.num_tokens, -key.num_entries, -1 if key.mode is None else key.mode, key.shares_prefix


def _at_least(sizes: Sequence[int], value: int) -> int:
    return sizes[bisect.bisect_left(sizes, value)]
