"""How many KV-cache blocks fit."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from charonia.config import GIB, EngineConfig
from charonia.errors import ConfigError
from charonia.worker.cuda_graphs import StepGraphs


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """num_blocks counts the null block too."""

    num_blocks: int
    bytes_per_block: int

    @property
    def gib(self) -> float:
        """Size of the whole cache in GiB."""
        return self.num_blocks * self.bytes_per_block / GIB


def size_kv_cache(
    config: EngineConfig, *, max_model_len: int, block_size: int, bytes_per_token: int, available_bytes: int,
    budget_name: str,
) -> KVCacheSize:  # fmt: skip
    """Blocks that `available_bytes` hold, but no more than all rows at full length can use.

    Raises `ConfigError` with the numbers and the setting to change when one `max_model_len` sequence does not fit.
    """
    bytes_per_block = bytes_per_token * block_size
    blocks_per_seq = -(-max_model_len // block_size)
    if config.num_kv_blocks_override is not None:
        usable, budget_name = config.num_kv_blocks_override, "num_kv_blocks_override"
    else:
        usable = max(0, available_bytes // bytes_per_block - 1)
    if usable < blocks_per_seq:
        raise ConfigError(
            f"the KV cache holds {usable * block_size} tokens ({usable * bytes_per_block / GIB:.2f} GiB), fewer "
            f"than one sequence of max_model_len = {max_model_len} tokens needs "
            f"({blocks_per_seq * bytes_per_block / GIB:.2f} GiB): raise '{budget_name}' or lower 'max_model_len'"
        )
    if config.num_kv_blocks_override is None:
        usable = min(usable, config.max_num_seqs * blocks_per_seq)
    return KVCacheSize(usable + 1, bytes_per_block)


def cpu_budget_bytes(config: EngineConfig) -> int:
    """The CPU's KV-cache budget: `cpu_kv_cache_gib`, but no more than a quarter of the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(int(config.cpu_kv_cache_gib * GIB), total // 4)


def measure_gpu_budget(
    config: EngineConfig,
    device: torch.device,
    run_largest_step: Callable[[], None],
    graphs: StepGraphs | None,
) -> int:
    """Run the largest step and capture the largest graphs, on the null block alone, and see what they leave."""
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    graphs_take = 0
    if graphs is not None:
        free_before, _ = torch.cuda.mem_get_info(device)
        keys = graphs.sizes.keys()
        with torch.inference_mode():
            graphs.capture([keys[0], next(key for key in keys if key.decodes_only)])
        graphs_take = free_before - torch.cuda.mem_get_info(device)[0]
        graphs.clear()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used_elsewhere = total - free - torch.cuda.memory_reserved(device)
    return gpu_budget_bytes(config, total=total, used_elsewhere=used_elsewhere, peak=peak + graphs_take)


def gpu_budget_bytes(config: EngineConfig, *, total: int, used_elsewhere: int, peak: int) -> int:
    """What `gpu_memory_utilization` leaves for the KV cache, in bytes.

    total: the GPU's memory. used_elsewhere: taken by other processes and the CUDA context. peak: this process's peak
    with the largest step, weights and captured graphs included.
    """
    return max(0, int(total * config.gpu_memory_utilization) - used_elsewhere - peak)
