"""The GPU's path through worker and models, its kernels in Triton's interpreter: greedy tokens are transformers'."""

from pathlib import Path
from typing import Any

import charonia_kernels
import pytest
import torch
from charonia.worker import attention, batch, model_runner
from charonia_kernels import gpu
from charonia_kernels.gpu._launch import INTERPRETED
from support import gpu_kernels  # noqa: F401 (mends the interpreter)
from support.core_driver import CoreDriver
from support.reference import greedy_golden
from support.tiny_models import gpu_shaped_model

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the engine takes this path by itself")

OPS = (
    "add_rms_norm", "append_tokens", "build_plan", "embedding", "gather_last_rows", "gelu_tanh_mul", "linear",
    "linear_add", "norm_linear", "norm_linear_silu_mul", "prepare_step", "qk_norm_rope_write", "rms_norm", "silu_mul",
)  # fmt: skip

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
BLOCK_SIZE = 16
BUDGET = 24
NUM_TOKENS = (3, 6, 3)


def planned_attention(q: Any, keys: Any, values: Any, table: Any, *rest: Any) -> torch.Tensor:
    """The dispatcher's signature, for CPU tensors."""
    _, _, scale, window, cap, k_scale, v_scale, plan = rest
    return gpu.paged_attention(q, keys, values, table, plan, scale, window, cap, k_scale, v_scale)


def allocate_plan(*sizes: Any, has_cascade: bool) -> Any:
    return gpu.AttentionPlan.allocate(*sizes, has_cascade=has_cascade)


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = {name: getattr(gpu, name) for name in OPS}
    replacements |= {"paged_attention": planned_attention, "allocate_plan": allocate_plan}
    for module in (charonia_kernels, attention, batch, model_runner):
        for name, function in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)


def prompts() -> list[list[int]]:
    """The first decodes while the second, longer than a step's budget, is cut into chunks; both take all rows. The
    third follows when the first has left, and begins with a block of the second: the two decode with a common prefix.
    The second ends in its third block.
    """
    generator = torch.Generator().manual_seed(1)
    short, long, tail = (torch.randint(3, 320, (size,), generator=generator).tolist() for size in (1, 31, 4))
    return [short, long, long[:BLOCK_SIZE] + tail]


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step reads a common prefix once; a block and two rows are enough."""
    monkeypatch.setattr(model_runner, "MIN_SHARED_KEYS", BLOCK_SIZE)
    monkeypatch.setattr(model_runner, "MIN_SHARING_ENTRIES", 2)
    original, answers = model_runner.pays_to_share, []

    def pays_to_share(layout: batch.StepLayout) -> bool:
        answers.append(original(layout))
        return answers[-1]

    monkeypatch.setattr(model_runner, "pays_to_share", pays_to_share)
    return answers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(name: str, sharing: list[bool], tmp_path: Path) -> None:
    model = gpu_shaped_model(name)
    model.save_pretrained(tmp_path)
    driver = CoreDriver(
        tmp_path, max_num_seqs=2, max_num_batched_tokens=BUDGET, block_size=BLOCK_SIZE, max_model_len=48
    )
    try:
        ids = [driver.add(*request) for request in zip(prompts(), NUM_TOKENS, strict=True)]
        driver.drain()
    finally:
        driver.core.shutdown()
    sequels = [driver.sequels[i] for i in ids]
    assert [sequel.num_cached_tokens for sequel in sequels] == [0, 0, BLOCK_SIZE]
    assert any(sharing)
    goldens = [greedy_golden(model, *request) for request in zip(prompts(), NUM_TOKENS, strict=True)]
    assert [sequel.token_ids for sequel in sequels] == [golden.tokens for golden in goldens]
