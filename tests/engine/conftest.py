"""One small model in this process, shared by all tests of the offline API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from charonia import LLM
from support.engines import tiny_model_dir


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("tiny-llm"))


@pytest.fixture(scope="session")
def shared_llm(tiny_dir: Path) -> Iterator[LLM]:
    settings = {"max_num_seqs": 12, "max_model_len": 400, "max_num_batched_tokens": 64, "cpu_threads": 2}
    with LLM(str(tiny_dir), load_format="dummy", dtype="float32", **settings) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared model; whatever a test does, nothing of it may be left in the engine."""
    yield shared_llm
    stats = shared_llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
