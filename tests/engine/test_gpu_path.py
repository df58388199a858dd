"""The GPU's path through worker and models, with its kernels in Triton's interpreter: greedy tokens are transformers'."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import charonia_kernels
import pytest
import torch
from charonia.worker import attention, batch, model_runner
from charonia_kernels import gpu
from charonia_kernels.gpu._launch import INTERPRETED
from support import gpu_kernels, interpreter_products  # noqa: F401 (patch the interpreter)
from support.core_driver import CoreDriver
from support.tiny_models import gpu_shaped_model

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the engine takes this path by itself")

OPS = (
    "add_rms_norm", "append_tokens", "build_plan", "embedding", "gather_last_rows", "gelu_tanh_mul", "linear",
    "linear_add", "norm_linear", "norm_linear_silu_mul", "prepare_step", "qk_norm_rope_write", "rms_norm", "silu_mul",
)  # fmt: skip


def planned_attention(q: Any, keys: Any, values: Any, table: Any, *rest: Any) -> torch.Tensor:
    """The dispatcher's signature, for CPU tensors."""
    _, _, scale, window, cap, k_scale, v_scale, plan = rest
    return gpu.paged_attention(q, keys, values, table, plan, scale, window, cap, k_scale, v_scale)


def allocate_plan(*sizes: Any, has_cascade: bool) -> Any:
    return gpu.AttentionPlan.allocate(*sizes, has_cascade=has_cascade)


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    replacements = {name: getattr(gpu, name) for name in OPS}
    replacements |= {"paged_attention": planned_attention, "allocate_plan": allocate_plan}
    for module in (charonia_kernels, attention, batch, model_runner):
        for name, function in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    yield


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
PROMPT_LENGTHS = [1, 37, 90, 20]
NUM_TOKENS = 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = gpu_shaped_model(name)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    # A shared prefix of two blocks, and a budget that cuts prompts into chunks beside decodes.
    prompts += [prompts[2][:64] + prompt[:9] for prompt in prompts[1:]]
    driver = CoreDriver(tmp_path, max_num_seqs=8, max_num_batched_tokens=48, block_size=32, max_model_len=128)
    try:
        sequels = driver.run(prompts, NUM_TOKENS)
    finally:
        driver.core.shutdown()
    for prompt, sequel in zip(prompts, sequels, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None
        )
        assert sequel.token_ids == expected[0, len(prompt) :].tolist()
