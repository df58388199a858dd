"""One gateway over one scripted Triton for all of these tests."""

from collections.abc import Iterator

import openai
import pytest
from charonia_client.gateway.settings import GatewaySettings
from support.fake_triton import FakeTriton, fake_triton
from support.gateway import running_gateway


@pytest.fixture(scope="session")
def scripted() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture
def fake(scripted: FakeTriton) -> FakeTriton:
    scripted.reset()
    return scripted


@pytest.fixture(scope="session")
def gateway_url(scripted: FakeTriton) -> Iterator[str]:
    """A gateway with default settings, but for the parsers, which tests choose by name."""
    settings = GatewaySettings(triton=scripted.url, tool_parser="hermes", reasoning_parser=None)
    with running_gateway(settings) as url:
        yield url


@pytest.fixture
def client(gateway_url: str, fake: FakeTriton) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0) as client:
        yield client
