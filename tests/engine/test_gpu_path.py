"""The GPU's path through worker and models, its kernels in Triton's interpreter: greedy tokens are transformers'."""

from pathlib import Path
from typing import Any

import charonia_kernels
import pytest
import torch
from charonia.worker import attention, batch, model_runner
from charonia.worker.cuda_graphs import GraphKey, GraphSizes
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


class EagerGraphs:
    """Stands in for `StepGraphs`: steps are padded as those of graphs are, and launched kernel by kernel."""

    def __init__(self, runner: model_runner.ModelRunner, sizes: GraphSizes) -> None:
        self.sizes = sizes
        self.keys: set[GraphKey] = set()
        self._run = runner._run_shape

    def replay(self, key: GraphKey) -> None:
        self.keys.add(key)
        self._run(key)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[EagerGraphs]:
    """Of the engine that is built next: its steps run padded."""
    made: list[EagerGraphs] = []

    def pad_steps(runner: model_runner.ModelRunner) -> None:
        setup = runner._setup
        sizes = GraphSizes(
            max_num_seqs=setup.max_num_seqs, max_num_tokens=setup.max_num_batched_tokens, shares_prefix=True
        )
        made.append(EagerGraphs(runner, sizes))
        monkeypatch.setattr(runner, "_graphs", made[0])
        hidden_size = runner._model_config.hidden_size
        monkeypatch.setattr(runner, "_last_hidden", torch.full((setup.max_num_seqs, hidden_size), torch.nan))

    monkeypatch.setattr(model_runner.ModelRunner, "capture_graphs", pad_steps)
    return made


def test_greedy_tokens_of_padded_steps(graphs: list[EagerGraphs], tmp_path: Path) -> None:
    model = gpu_shaped_model("qwen3")
    model.save_pretrained(tmp_path)
    driver = CoreDriver(
        tmp_path, max_num_seqs=7, max_num_batched_tokens=40, block_size=BLOCK_SIZE, max_model_len=48
    )
    lengths = (4, 3, 2, 5, 3)
    asked = list(zip([*prompts(), *prompts()[:2]], lengths, strict=True))
    try:
        ids = [driver.add(*request) for request in asked]
        driver.drain()
    finally:
        driver.core.shutdown()
    assert {key.num_tokens for key in graphs[0].keys} >= {1, 4, 16, 40}
    goldens = [greedy_golden(model, *request) for request in asked]
    assert [driver.sequels[i].token_ids for i in ids] == [golden.tokens for golden in goldens]


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
