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
_CPU_BLOCK_SIZE = 16
_GPU_BLOCK_SIZE = 64
"""One block is one tile of the attention kernels there."""
_GPU_BLOCK_SIZES = (16, 32, 64, 128)
_GPU_MAX_NUM_SEQS = 1024
"""What the kernel that plans attention can look over at once."""


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """Where and in what precision a model runs, and its limits."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cpu_threads: int
    whole_prompts: bool = False
    """The model is an encoder: each prompt is computed in one step, and takes one block of its own."""

    def scheduler_config(self, config: EngineConfig, num_blocks: int) -> SchedulerConfig:
        """The scheduler's limits, for a KV cache of `num_blocks` blocks."""
        threshold = config.long_prefill_token_threshold or max(1, self.max_num_batched_tokens // 4)
        if self.whole_prompts:
            # Nothing decodes that a prompt could hold up.
            threshold = self.max_num_batched_tokens
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=num_blocks,
            long_prefill_token_threshold=threshold,
            max_long_partial_prefills=config.max_long_partial_prefills,
            max_waiting_requests=config.max_waiting_requests,
            policy=config.scheduling_policy,
            enable_prefix_caching=config.enable_prefix_caching and not self.whole_prompts,
            lookahead=1 if config.async_scheduling else 0,
            whole_prompts=self.whole_prompts,
        )


def resolve(config: EngineConfig, model: ModelConfig) -> DeviceSetup:
    """Choose device, dtype and limits. Raises `ConfigError` for what the checkpoint or the machine cannot do."""
    device = _resolve_device(config)
    if device.type == "cuda" and config.max_num_seqs > _GPU_MAX_NUM_SEQS:
        raise ConfigError(
            f"engine setting 'max_num_seqs' must be at most {_GPU_MAX_NUM_SEQS} on a GPU, got {config.max_num_seqs}"
        )
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"engine setting 'max_model_len' ({max_model_len}) exceeds the context length ({model.max_position})"
        )
    budget = config.max_num_batched_tokens or max(
        config.max_num_seqs,
        _CPU_TOKEN_BUDGET if device.type == "cpu" else _GPU_TOKEN_BUDGET,
        0 if model.generates else max_model_len,
    )
    if not model.generates and budget < max_model_len:
        raise ConfigError(
            f"engine setting 'max_num_batched_tokens' ({budget}) must be at least max_model_len ({max_model_len}): "
            f"an encoder computes each prompt in one step"
        )
    dtype = resolve_dtype(config, model, device)
    return DeviceSetup(
        device=device,
        dtype=dtype,
        kv_dtype=_resolve_kv_dtype(config, dtype, device),
        block_size=_resolve_block_size(config, device) if model.generates else max_model_len,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        cpu_threads=config.cpu_threads or len(os.sched_getaffinity(0)),
        whole_prompts=not model.generates,
    )


def _resolve_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine setting 'device' is 'cuda', but torch sees no CUDA device")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu") if name == "cpu" else torch.device("cuda", torch.cuda.current_device())


def _resolve_kv_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if config.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cpu":
        raise ConfigError(
            f"engine setting 'kv_cache_dtype' is {config.kv_cache_dtype!r}, but on a CPU only 'auto' is available"
        )
    return torch.float8_e4m3fn


def _resolve_block_size(config: EngineConfig, device: torch.device) -> int:
    if config.block_size is None:
        return _CPU_BLOCK_SIZE if device.type == "cpu" else _GPU_BLOCK_SIZE
    if device.type == "cuda" and config.block_size not in _GPU_BLOCK_SIZES:
        raise ConfigError(
            f"engine setting 'block_size' must be one of {', '.join(map(str, _GPU_BLOCK_SIZES))} on a GPU, "
            f"got {config.block_size}"
        )
    return config.block_size
