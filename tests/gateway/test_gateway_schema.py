"""Whatever fits the OpenAPI document, and what does not, is answered without a fault of the gateway."""

import pytest
import schemathesis
from charonia_client.gateway.app import create_app
from charonia_client.gateway.settings import GatewaySettings
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from support.gateway import running_gateway

DOCUMENT = create_app(GatewaySettings(triton="127.0.0.1:1")).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.fixture(scope="module")
def url(scripted):
    """A gateway with all parsers chosen by the template."""
    with running_gateway(GatewaySettings(triton=scripted.url)) as address:
        yield address


def test_the_document_has_every_route():
    assert {label.split()[1] for label in OPERATIONS} == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/models",
        "/v1/models/{name}", "/health", "/version", "/metrics",
    }  # fmt: skip


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(label, POSITIVE) for label in OPERATIONS] + [
    (label, NEGATIVE) for label in OPERATIONS if "POST" in label
]


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_no_server_errors(url, fake, label, mode):
    @settings(
        max_examples=15 if "POST" in label else 2,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def check(case):
        answer = case.call(base_url=url, timeout=30)
        case.validate_response(answer, checks=[not_a_server_error])
        statuses.add(answer.status_code)

    statuses = set()
    check()
    if mode is POSITIVE and "{" not in label:
        assert 200 in statuses, statuses
