"""Runs an encoder's steps on one device: whole prompts in, embeddings out. There is no KV cache and no sampling."""

from dataclasses import dataclass

import torch

from charonia.core.step import NewRow, StepPlan, StepResult
from charonia.model_config import ModelConfig
from charonia.models import BertEncoder
from charonia.pooling_params import PoolingParams
from charonia.worker.logprobs import sent_to_host
from charonia.worker.memory import KVCacheSize
from charonia.worker.pooling import PendingEmbeddings, embed
from charonia.worker.setup import DeviceSetup

_WARM_UP_TOKENS = (1, 2, 8, 16, 64, 96, 128, 256)
"""Between them they reach every kernel of a GPU's linear layers."""


@dataclass(frozen=True, slots=True)
class EncoderStep:
    """A step whose device work has been issued. copied: when its embeddings are on the host; None if they are now."""

    step_id: int
    embeddings: PendingEmbeddings
    copied: torch.Event | None

    def wait(self) -> StepResult:
        """What the step brought; blocks until it has run."""
        if self.copied is not None:
            self.copied.synchronize()
        embeddings, failed = self.embeddings.collect()
        return StepResult(self.step_id, [], failed_rows=failed, embeddings=embeddings)


class EncoderRunner:
    """One encoder on one device. All methods must be called from one thread at a time.

    Invariant: a plan's chunks are its new rows, each with its whole prompt (`SchedulerConfig.whole_prompts`), so no
    state outlives a step.
    """

    def __init__(self, model_config: ModelConfig, setup: DeviceSetup, model: BertEncoder) -> None:
        self._model_config = model_config
        self._setup = setup
        self._model = model

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Run every kernel once, on a GPU, where they are compiled when they first run."""
        if self._setup.device.type == "cuda":
            for count in (*_WARM_UP_TOKENS, self._setup.max_num_batched_tokens):
                length = min(count, self._setup.max_model_len)
                self._forward([[0] * length] * max(1, count // length))
            torch.cuda.synchronize(self._setup.device)

    def allocate_cache(self) -> KVCacheSize:
        """One empty block a row, as long as any prompt: what the scheduler counts, and no memory."""
        return KVCacheSize(self._setup.max_num_seqs + 1, 0)

    def capture_graphs(self) -> None:
        """There are none."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> EncoderStep:
        """Issue a step's device work."""
        rows = {new.row: new for new in plan.new_rows}
        batch = [rows[chunk.row] for chunk in plan.chunks]
        hidden = self._forward([new.token_ids for new in batch])
        parts = torch.split(hidden, [len(new.token_ids) for new in batch])
        vectors = {new.row: sent_to_host(_pool(new, part)) for new, part in zip(batch, parts, strict=True)}
        copied = None
        if hidden.is_cuda:
            copied = torch.Event("cuda")
            copied.record()
        return EncoderStep(plan.step_id, PendingEmbeddings(vectors), copied)

    def _forward(self, prompts: list[list[int]]) -> torch.Tensor:
        """Hidden states of all prompts, one after the other: [T, H]."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        device = self._setup.device
        return self._model(ids.to(device), positions.to(device), lengths)


def _pool(new: NewRow, hidden: torch.Tensor) -> torch.Tensor:
    """The embedding of one prompt, from its hidden states [N, H]."""
    params = new.pooling or PoolingParams()
    match params.pooling_type:
        case "mean":
            pooled = hidden.float().mean(dim=0)
        case "last":
            pooled = hidden[-1]
        case _:
            pooled = hidden[0]
    return embed(pooled, params)
