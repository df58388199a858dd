"""Runs steps on one device: rows in, sampled tokens out."""

from dataclasses import dataclass

import torch

from charonia.config import EngineConfig
from charonia.core.step import StepPlan, StepResult
from charonia.model_config import ModelConfig
from charonia.models import CausalLM
from charonia.outputs import TokenLogprobs
from charonia.worker.attention import KVCache, PagedAttention
from charonia.worker.batch import AttentionMetadata, InputBatch, build_batch
from charonia.worker.memory import KVCacheSize, cpu_budget_bytes, gpu_budget_bytes, size_kv_cache
from charonia.worker.rows import RequestRows
from charonia.worker.sampler import gather_logprobs, sample
from charonia.worker.setup import DeviceSetup

PROMPT_LOGPROBS_CHUNK = 128
"""Positions whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step whose device work has been issued; `result` waits for it."""

    step_id: int
    sampled_rows: list[int]
    tokens: torch.Tensor
    usable: torch.Tensor
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[TokenLogprobs]]

    def result(self) -> StepResult:
        """Bring the sampled tokens to the host."""
        failed: list[int] = []
        if not bool(self.usable.all()):
            failed = [row for row, ok in zip(self.sampled_rows, self.usable.tolist(), strict=True) if not ok]
        return StepResult(self.step_id, self.tokens.tolist(), self.logprobs, self.prompt_logprobs, failed)


class ModelRunner:
    """One model on one device, with its KV cache and the rows of its running requests.

    All methods must be called from one thread at a time, steps in the order of their plans.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, setup: DeviceSetup, model: CausalLM
    ) -> None:
        self._config = config
        self._model_config = model_config
        self._setup = setup
        self._model = model
        self.kv_cache_size = self._size_kv_cache()
        self._cache = self._allocate_cache(self.kv_cache_size.num_blocks)
        self._rows = RequestRows(
            max_num_seqs=setup.max_num_seqs, max_model_len=setup.max_model_len, block_size=config.block_size,
            vocab_size=model_config.vocab_size, device=setup.device,
        )  # fmt: skip

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> DeviceStep:
        """Issue a step's device work."""
        self._rows.apply(plan)
        batch = build_batch(plan, self._rows)
        hidden = self._model(batch.input_ids, batch.positions, PagedAttention(self._cache, batch.attention))
        prompt_logprobs = self._prompt_logprobs(hidden, batch)
        rows = [item.row for item in batch.sampled]
        if not rows:
            empty = torch.empty(0, dtype=torch.int64)
            return DeviceStep(plan.step_id, rows, empty, empty.bool(), {}, prompt_logprobs)
        logits = self._model.compute_logits(hidden[batch.sample_indices])
        output = sample(logits, self._rows, batch.sampled)
        self._append_tokens(batch, output.tokens)
        logprobs = {rows[i]: entry for i, entry in output.logprobs.items()}
        return DeviceStep(plan.step_id, rows, output.tokens, output.usable, logprobs, prompt_logprobs)

    def _append_tokens(self, batch: InputBatch, tokens: torch.Tensor) -> None:
        """Feed the sampled tokens to the next step."""
        rows = [item.row for item in batch.sampled]
        positions = [item.position for item in batch.sampled]
        self._rows.token_ids[rows, positions] = tokens.to(torch.int32)

    def _prompt_logprobs(self, hidden: torch.Tensor, batch: InputBatch) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that follow the positions computed in this step."""
        found: dict[int, list[TokenLogprobs]] = {}
        for row, first, start, length in batch.chunks:
            state = self._rows[row]
            count = state.sampling.prompt_logprobs
            if count is None:
                continue
            # Position p predicts token p + 1; the last prompt position predicts the first output token.
            length = min(length, state.num_prompt - 1 - first)
            entries: list[TokenLogprobs] = []
            for offset in range(0, length, PROMPT_LOGPROBS_CHUNK):
                size = min(PROMPT_LOGPROBS_CHUNK, length - offset)
                logits = self._model.compute_logits(hidden[start + offset : start + offset + size])
                logprobs = torch.log_softmax(logits.float(), dim=-1)
                position = first + offset + 1
                targets = self._rows.token_ids[row, position : position + size].long()
                entries.extend(gather_logprobs(logprobs, targets, [count] * size))
            if entries:
                found[row] = entries
        return found

    # ---- memory ----

    def _allocate_cache(self, num_blocks: int) -> KVCache:
        model = self._model_config
        return KVCache.allocate(
            num_layers=model.num_layers, num_blocks=num_blocks, num_kv_heads=model.num_kv_heads,
            block_size=self._config.block_size, head_dim=model.head_dim, dtype=self._setup.dtype,
            device=self._setup.device,
        )  # fmt: skip

    def _size_kv_cache(self) -> KVCacheSize:
        model, device = self._model_config, self._setup.device
        bytes_per_token = (
            2 * model.num_layers * model.num_kv_heads * model.head_dim * self._setup.dtype.itemsize
        )
        if device.type == "cpu":
            available, budget_name = cpu_budget_bytes(self._config), "cpu_kv_cache_gib"
        else:
            available, budget_name = self._measure_gpu_budget(), "gpu_memory_utilization"
        return size_kv_cache(
            self._config, max_model_len=self._setup.max_model_len, bytes_per_token=bytes_per_token,
            available_bytes=available, budget_name=budget_name,
        )  # fmt: skip

    def _measure_gpu_budget(self) -> int:
        """Run the largest step once and see what it takes."""
        device = self._setup.device
        torch.cuda.reset_peak_memory_stats(device)
        self._run_largest_step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        used_elsewhere = total - free - torch.cuda.memory_reserved(device)
        return gpu_budget_bytes(self._config, total=total, used_elsewhere=used_elsewhere, peak=peak)

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        """A full token budget in as many rows as there are, on a cache of the null block alone."""
        setup, device = self._setup, self._setup.device
        tokens, rows = setup.max_num_batched_tokens, setup.max_num_seqs
        starts = torch.arange(rows + 1, device=device) * tokens // rows
        lengths = (starts[1:] - starts[:-1]).to(torch.int32)
        blocks = -(-int(lengths.max()) // self._config.block_size)
        metadata = AttentionMetadata(
            slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
            block_table=torch.zeros((rows, blocks), dtype=torch.int32, device=device),
            seq_lens=lengths,
            query_start_loc=starts.to(torch.int32),
        )
        ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        hidden = self._model(ids, ids, PagedAttention(self._allocate_cache(1), metadata))
        logits = self._model.compute_logits(hidden[:rows]).float()
        torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
