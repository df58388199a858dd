"""How many KV-cache blocks fit, and what is said when too few do."""

import pytest
from charonia.config import GIB, EngineConfig
from charonia.errors import ConfigError
from charonia.worker.memory import KVCacheSize, cpu_budget_bytes, gpu_budget_bytes, size_kv_cache

MIB = 1 << 20


def size(max_model_len: int, available: int, **settings: int) -> KVCacheSize:
    """A model of 1 KiB a token: a block of 16 tokens takes 16 KiB."""
    return size_kv_cache(
        EngineConfig(model="m", **settings),
        max_model_len=max_model_len,
        block_size=16,
        bytes_per_token=1024,
        available_bytes=available,
        budget_name="cpu_kv_cache_gib",
    )


def test_blocks_fill_the_budget_with_one_for_nobody() -> None:
    found = size(4096, 64 * MIB)
    assert found == KVCacheSize(num_blocks=4096, bytes_per_block=16384)
    assert found.num_blocks * found.bytes_per_block <= 64 * MIB
    assert found.gib == 64 * MIB / GIB


def test_no_more_than_all_rows_can_use() -> None:
    assert size(100, 10 * GIB, max_num_seqs=3).num_blocks == 3 * 7 + 1


def test_exactly_one_sequence_fits() -> None:
    assert size(4096, (256 + 1) * 16384).num_blocks == 257
    assert size(4096, 0, num_kv_blocks_override=256).num_blocks == 257
    assert size(4081, 0, num_kv_blocks_override=256).num_blocks == 257


@pytest.mark.parametrize("max_model_len", [4096, 4081])
def test_one_sequence_that_does_not_fit(max_model_len: int) -> None:
    with pytest.raises(ConfigError) as error:
        size(max_model_len, 257 * 16384 - 1)
    message = str(error.value)
    assert "holds 4080 tokens" in message and f"max_model_len = {max_model_len}" in message
    assert "'cpu_kv_cache_gib'" in message and "'max_model_len'" in message
    with pytest.raises(ConfigError, match=r"holds 4080 tokens.*raise 'num_kv_blocks_override'"):
        size(max_model_len, 10 * GIB, num_kv_blocks_override=255)


@pytest.mark.parametrize("available", [0, 1, 16384])
def test_no_budget_at_all(available: int) -> None:
    with pytest.raises(ConfigError, match=r"holds 0 tokens \(0\.00 GiB\)"):
        size(1, available)


def test_cpu_budget_is_bounded_by_the_machine() -> None:
    assert cpu_budget_bytes(EngineConfig(model="m", cpu_kv_cache_gib=0.25)) == GIB // 4
    assert cpu_budget_bytes(EngineConfig(model="m", cpu_kv_cache_gib=1e6)) < 1e5 * GIB


def test_gpu_budget() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert gpu_budget_bytes(config, total=80 * GIB, used_elsewhere=GIB, peak=9 * GIB) == 30 * GIB
    assert gpu_budget_bytes(config, total=80 * GIB, used_elsewhere=39 * GIB, peak=9 * GIB) == 0
