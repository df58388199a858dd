"""Resolves a configuration against a checkpoint and a machine: automatic choices become numbers."""

import os
from dataclasses import dataclass

import torch

from charonia.config import EngineConfig, SchedulerConfig
from charonia.errors import ConfigError
from charonia.model_config import ModelConfig
from charonia.models import resolve_dtype

_CPU_TOKEN_BUDGET = 512
_GPU_TOKEN_BUDGET = 8192


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """Where and in what precision a model runs, and its limits."""

    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cpu_threads: int

    def scheduler_config(self, config: EngineConfig, num_blocks: int) -> SchedulerConfig:
        """The scheduler's limits, for a KV cache of `num_blocks` blocks."""
        threshold = config.long_prefill_token_threshold or max(1, self.max_num_batched_tokens // 4)
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            block_size=config.block_size,
            num_blocks=num_blocks,
            long_prefill_token_threshold=threshold,
            max_long_partial_prefills=config.max_long_partial_prefills,
            max_waiting_requests=config.max_waiting_requests,
            policy=config.scheduling_policy,
            enable_prefix_caching=config.enable_prefix_caching,
            lookahead=1 if config.async_scheduling else 0,
        )


def resolve(config: EngineConfig, model: ModelConfig) -> DeviceSetup:
    """Choose device, dtype and limits. Raises `ConfigError` for what the checkpoint or the machine cannot do."""
    device = _resolve_device(config)
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"engine setting 'max_model_len' ({max_model_len}) exceeds the context length ({model.max_position})"
        )
    budget = config.max_num_batched_tokens or max(
        config.max_num_seqs, _CPU_TOKEN_BUDGET if device.type == "cpu" else _GPU_TOKEN_BUDGET
    )
    return DeviceSetup(
        device=device,
        dtype=resolve_dtype(config, model, device),
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        cpu_threads=config.cpu_threads or len(os.sched_getaffinity(0)),
    )


def _resolve_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine setting 'device' is 'cuda', but torch sees no CUDA device")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
