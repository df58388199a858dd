"""Runs steps on one device: rows in, sampled tokens out."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from charonia_kernels import allocate_plan, append_tokens, build_plan, gather_last_rows, gpu

from charonia.config import EngineConfig
from charonia.core.step import StepPlan, TokenMasks
from charonia.model_config import ModelConfig
from charonia.models import CausalLM
from charonia.worker import prompt_logprobs
from charonia.worker.attention import KVCache, PagedAttention
from charonia.worker.batch import InputBatch, StepBuffers, StepLayout
from charonia.worker.cuda_graphs import GraphKey, GraphSizes, StepGraphs, dry_run_keys
from charonia.worker.device_sampler import DeviceSampler
from charonia.worker.memory import KVCacheSize, cpu_budget_bytes, measure_gpu_budget, size_kv_cache
from charonia.worker.pooling import PendingEmbeddings, Pooler
from charonia.worker.results import DeviceStep, HostTokens, PendingTokens, TokenOutbox
from charonia.worker.rows import RequestRows
from charonia.worker.sampling import Draw, HostSampler, Sampler
from charonia.worker.sampling_mode import SamplingMode
from charonia.worker.setup import DeviceSetup

MIN_SHARED_KEYS = 256
MIN_SHARING_ENTRIES = 4
"""From so many keys and entries on, reading a common prefix once saves more than the extra kernel costs."""


def pays_to_share(layout: StepLayout) -> bool:
    """Whether the entries' common prefix is long enough, and shared by enough of them, to be read once for all.

    Beside chunks it is not: their steps take so long that the gain would not pay for graphs of their own.
    """
    enough = layout.common_prefix >= MIN_SHARED_KEYS and layout.num_entries >= MIN_SHARING_ENTRIES
    return layout.decodes_only and enough


@dataclass(frozen=True, slots=True)
class StartedStep:
    """A step of which everything but the drawing has been issued.

    batch, last: what tokens are drawn from, the hidden states of each entry's last token [B, H], and of padding behind
    them; None where a graph has drawn them already.
    """

    step_id: int
    layout: StepLayout
    mode: SamplingMode
    batch: InputBatch | None = None
    last: torch.Tensor | None = None
    scores: prompt_logprobs.PromptLogprobs | None = None
    embeddings: PendingEmbeddings | None = None


class ModelRunner:
    """One model on one device, with its KV cache and the rows of its running requests.

    All methods must be called from one thread at a time, steps in the order of their plans.

    On a GPU nothing here waits for the device: `execute` issues work and returns. Steps up to a bounded size are
    replays of captured graphs, of which only the row deltas in front and the copy of the tokens behind are not a part.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, setup: DeviceSetup, model: CausalLM
    ) -> None:
        self._config = config
        self._model_config = model_config
        self._setup = setup
        self._model = model
        device, max_num_seqs = setup.device, setup.max_num_seqs
        self._rows = RequestRows(
            max_num_seqs=max_num_seqs, max_model_len=setup.max_model_len, block_size=setup.block_size,
            vocab_size=model_config.vocab_size, device=device,
        )  # fmt: skip
        self._buffers = StepBuffers(self._rows, setup.max_num_batched_tokens)
        self._sampler: Sampler = HostSampler(self._rows)
        self._pooler = Pooler(model.norm)
        self._outbox: TokenOutbox | None = None
        self._plan = allocate_plan(
            max_num_seqs, setup.max_num_batched_tokens, model_config.num_heads, model_config.num_kv_heads,
            model_config.head_dim, setup.block_size, device, has_cascade=config.enable_prefix_caching,
        )  # fmt: skip
        self._graphs: StepGraphs | None = None
        self._last_hidden = torch.empty(0)
        if device.type == "cuda":
            self._outbox = TokenOutbox(max_num_seqs, device)
            self._sampler = DeviceSampler(
                self._rows, self._outbox, max_num_seqs=max_num_seqs, vocab_size=model_config.vocab_size,
                device=device,
            )  # fmt: skip
            self._last_hidden = torch.zeros(
                max_num_seqs, model_config.hidden_size, dtype=setup.dtype, device=device
            )
            if not config.enforce_eager:
                sizes = GraphSizes(
                    max_num_seqs=max_num_seqs, max_num_tokens=setup.max_num_batched_tokens,
                    shares_prefix=config.enable_prefix_caching,
                )  # fmt: skip
                self._graphs = StepGraphs(self._run_shape, sizes, device)
        # Until the real one is allocated: the null block alone.
        self._cache = self._allocate_cache(1)

    # ---- before the first step, in this order ----

    def compile_kernels(self) -> None:
        """Compile every kernel that a step may launch, of every shape that is compiled for itself."""
        if self._setup.device.type == "cuda":
            with gpu.compile_only(os.cpu_count() or 1):
                self._dry_run()

    def allocate_cache(self) -> KVCacheSize:
        """Allocate the KV cache; returns its size. Raises `ConfigError` if one sequence of full length does not fit."""
        model, setup = self._model_config, self._setup
        if setup.device.type == "cpu":
            available, budget_name = cpu_budget_bytes(self._config), "cpu_kv_cache_gib"
        else:
            available = measure_gpu_budget(self._config, setup.device, self._run_largest_step, self._graphs)
            budget_name = "gpu_memory_utilization"
        size = size_kv_cache(
            self._config, max_model_len=setup.max_model_len, block_size=setup.block_size,
            bytes_per_token=2 * model.num_layers * model.num_kv_heads * model.head_dim * setup.kv_dtype.itemsize,
            available_bytes=available, budget_name=budget_name,
        )  # fmt: skip
        self._cache = self._allocate_cache(size.num_blocks)
        return size

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture every graph that a step may need."""
        if self._graphs is not None:
            self._graphs.capture(self._graphs.sizes.keys())

    # ---- steps ----

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> DeviceStep:
        """Issue a step's device work."""
        return self.finish(self.start(plan))

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> StartedStep:
        """Issue a step's device work up to the drawing; `finish` must come before the next step's `start`."""
        rows, graphs = self._rows, self._graphs
        if self._outbox is not None:
            self._outbox.begin()
        rows.apply(plan)
        self._sampler.apply(plan)
        self._pooler.apply(plan)
        layout = StepLayout.of(plan, rows)
        mode = self._sampler.mode()
        scores_prompt = prompt_logprobs.wanted(layout, rows)
        shares_prefix = self._plan is not None and pays_to_share(layout)
        key = None
        if graphs is not None and not scores_prompt and not self._pooler.needs_all(layout):
            key = graphs.sizes.key_for(layout, mode, shares_prefix)
        layout.stage(rows, layout.num_entries if key is None else key.num_entries)
        rows.flush()
        if graphs is None or key is None:
            return self._run_eagerly(plan.step_id, layout, mode, scores_prompt, shares_prefix)
        graphs.replay(key)
        if key.mode is not None:
            return StartedStep(plan.step_id, layout, mode)
        # FULL looks at the layout's own entries; the others run in the few sizes that have been compiled.
        padded = mode is not SamplingMode.FULL
        entries = key.num_entries if padded else layout.num_entries
        return StartedStep(
            plan.step_id, layout, mode,
            batch=self._buffers.batch(entries, key.num_tokens if padded else layout.num_tokens),
            last=self._last_hidden[: graphs.sizes.entries_drawn(key, layout)],
            embeddings=self._pooler.pool(layout, self._last_hidden, None),
        )  # fmt: skip

    @torch.inference_mode()
    def finish(self, step: StartedStep, masks: TokenMasks | None = None) -> DeviceStep:
        """Issue the drawing of a started step. masks: for its constrained rows."""
        draw = None
        if step.batch is not None and step.last is not None:
            draw = self._draw(step.last, step.batch, step.mode, step.layout, masks)
        return DeviceStep(
            step.step_id, step.layout, self._send(draw, step.layout), None if draw is None else draw.logprobs,
            step.scores, step.embeddings,
        )  # fmt: skip

    def _send(self, draw: Draw | None, layout: StepLayout) -> PendingTokens:
        if self._outbox is not None:
            return self._outbox.send(layout.num_entries)
        assert draw is not None
        return HostTokens(draw.tokens, draw.outcomes)

    # ---- a step's device work ----

    def _run_eagerly(
        self, step_id: int, layout: StepLayout, mode: SamplingMode, scores_prompt: bool, shares_prefix: bool
    ) -> StartedStep:
        batch = self._buffers.batch(layout.num_entries, layout.num_tokens)
        hidden = self._forward(
            batch,
            has_chunks=bool((layout.lengths > 1).any()),
            decodes_only=layout.decodes_only,
            shares_prefix=shares_prefix,
            model=self._model,
        )
        scores = None
        if scores_prompt:
            compute_logits = self._model.compute_logits
            scores = prompt_logprobs.PromptLogprobs.compute(layout, self._rows, hidden, compute_logits)
        last = gather_last_rows(hidden, batch.query_start_loc)
        embeddings = self._pooler.pool(layout, last, hidden)
        return StartedStep(step_id, layout, mode, batch, last, scores, embeddings)

    def _run_shape(self, key: GraphKey, model: CausalLM | None = None) -> None:
        """The device work of a step of the key's shape, for capture."""
        batch = self._buffers.batch(key.num_entries, key.num_tokens)
        hidden = self._forward(
            batch,
            has_chunks=not key.decodes_only,
            decodes_only=key.decodes_only,
            shares_prefix=key.shares_prefix,
            model=model or self._model,
        )
        if key.mode is None:
            self._last_hidden[: key.num_entries].copy_(gather_last_rows(hidden, batch.query_start_loc))
        else:
            # Each entry's last token is its only one.
            self._draw(hidden, batch, key.mode, None, None)

    def _forward(
        self,
        batch: InputBatch,
        *,
        has_chunks: bool,
        decodes_only: bool,
        shares_prefix: bool,
        model: CausalLM,
    ) -> torch.Tensor:
        """Hidden states of all tokens: [T, H].

        has_chunks: some entry may have more than one token. decodes_only: the step has no chunk, not even of one token;
        with one, an entry may see keys that another writes in this step.
        """
        rows = self._rows
        self._buffers.prepare(batch)
        if self._plan is None:
            context = PagedAttention(self._cache, batch, rows.block_table[batch.rows])
        else:
            plan = self._plan.sized(
                batch.num_entries, batch.num_tokens, True, has_chunks, shares_prefix, decodes_only
            )
            build_plan(plan, batch.query_start_loc, batch.seq_lens, batch.rows, rows.step_prefix)
            context = PagedAttention(self._cache, batch, rows.block_table, plan)
        return model(batch.input_ids, batch.positions, context)

    def _draw(
        self,
        last: torch.Tensor,
        batch: InputBatch,
        mode: SamplingMode,
        layout: StepLayout | None,
        masks: TokenMasks | None,
    ) -> Draw:
        """Draw from the hidden states of each entry's last token, and feed the tokens to the next step.

        last: [B, H], or more, of which the rest is padding that logits are computed of.
        """
        if layout is not None and self._outbox is None and not layout.samples.any():
            # A step of prompts alone: no row wants logits.
            draw = HostSampler.nothing(batch.num_entries)
            return self._append(draw, batch)
        logits = self._model.compute_logits(last)[: batch.num_entries]
        if layout is not None and mode is SamplingMode.FULL:
            draw = self._sampler.draw_full(logits, batch, layout, masks)
        else:
            draw = self._sampler.draw(logits, batch, mode)
        return self._append(draw, batch)

    def _append(self, draw: Draw, batch: InputBatch) -> Draw:
        """Move the rows on, with the tokens drawn where they sample."""
        rows = self._rows
        append_tokens(
            batch.rows, batch.query_start_loc, batch.seq_lens, batch.samples, draw.tokens, rows.num_computed,
            rows.token_ids,
        )  # fmt: skip
        return draw

    @torch.inference_mode()
    def _dry_run(self) -> None:
        """Launch what any step may launch; touches no row."""
        self._rows.dry_run()
        setup, sketch = self._setup, self._model.sketch()
        for key in dry_run_keys(
            setup.max_num_seqs, setup.max_num_batched_tokens, self._config.enable_prefix_caching
        ):
            self._run_shape(key, sketch)
        batch = self._buffers.batch(min(8, self._setup.max_num_seqs), 8)
        hidden = torch.zeros(batch.num_entries, self._model_config.hidden_size, dtype=self._setup.dtype,
                             device=self._setup.device)  # fmt: skip
        self._sampler.dry_run(self._model.compute_logits(hidden), batch)
        self._pooler.dry_run(hidden)

    def _allocate_cache(self, num_blocks: int) -> KVCache:
        model, setup = self._model_config, self._setup
        return KVCache.allocate(
            num_layers=model.num_layers, num_blocks=num_blocks, num_kv_heads=model.num_kv_heads,
            block_size=setup.block_size, head_dim=model.head_dim, dtype=setup.kv_dtype, device=setup.device,
        )  # fmt: skip

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        """A full token budget in as many rows as there are, drawn in the mode that takes the most memory."""
        setup = self._setup
        entries, tokens = setup.max_num_seqs, setup.max_num_batched_tokens
        ends = np.arange(1, entries + 1, dtype=np.int64) * tokens // entries
        lengths = np.diff(ends, prepend=0).clip(max=setup.max_model_len).astype(np.int32)
        rows = np.arange(entries, dtype=np.int32)
        none = np.zeros(entries, np.int32)
        layout = StepLayout(rows, lengths, none, none, 0, int(lengths.sum()))
        layout.stage(self._rows, entries)
        self._rows.flush()
        step = self._run_eagerly(0, layout, SamplingMode.FULL, scores_prompt=False, shares_prefix=False)
        assert step.batch is not None, "steps without a graph leave the drawing to `finish`"
        assert step.last is not None, "as above"
        self._draw(step.last, step.batch, step.mode, layout, None)
        # The rows were never entered: undo what the end of a step does to them.
        self._rows.num_computed.zero_()
