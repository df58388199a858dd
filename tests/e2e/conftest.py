"""The services that the end-to-end tests share: one with the real model, one with a tiny one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from charonia.entrypoints.default_model import ensure_default_model
from support.engines import tiny_model_dir
from support.served import Served, serving


@pytest.fixture(scope="session")
def real_model() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded default model in fp32; only for tests that leave it as it is."""
    with serving(tmp_path_factory.mktemp("real"), None, "--dtype=float32") as served:
        yield served
