"""Whatever fits the OpenAPI document, and what does not, has an answer of the documented form."""

import pydantic
import pytest
import schemathesis
from charonia_client.gateway.app import create_app
from charonia_client.gateway.errors import ErrorBody
from charonia_client.gateway.settings import GatewaySettings
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from support.gateway import running_gateway

pytestmark = pytest.mark.usefixtures("fake")  # what a test before them had it say must not hold them up

DOCUMENT = create_app(GatewaySettings(triton="127.0.0.1:1")).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


class ModelList(pydantic.BaseModel):
    data: list[Model]


ANSWERS: dict[str, type[pydantic.BaseModel]] = {
    "POST /v1/chat/completions": ChatCompletion,
    "POST /v1/completions": Completion,
    "POST /v1/embeddings": CreateEmbeddingResponse,
    "GET /v1/models": ModelList,
}
CHUNKS: dict[str, type[pydantic.BaseModel]] = {
    "POST /v1/chat/completions": ChatCompletionChunk,
    "POST /v1/completions": Completion,
}


@pytest.fixture(scope="module")
def url(scripted):
    """A gateway with all parsers chosen by the template."""
    with running_gateway(GatewaySettings(triton=scripted.url)) as address:
        yield address


def ask(case: schemathesis.Case, url: str) -> int:
    """Check the answer to a case against the types of the official client; its status."""
    answer = case.call(base_url=url, timeout=30)
    case.validate_response(answer, checks=[not_a_server_error])
    label = case.operation.label
    if answer.status_code >= 400:
        if case.method != "HEAD":
            ErrorBody.model_validate_json(answer.content)
    elif is_beyond_the_types(case):
        pass
    elif answer.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        *events, last = answer.content.decode().removesuffix("\n\n").split("\n\n")
        assert last == "data: [DONE]"
        for event in events:
            CHUNKS[label].model_validate_json(event.removeprefix("data: "))
    elif label in ANSWERS:
        ANSWERS[label].model_validate_json(answer.content)
    return answer.status_code


def is_beyond_the_types(case: schemathesis.Case) -> bool:
    """The client's types have neither base64 nor the missing log-probability of an echoed prompt's first token."""
    body = case.body if isinstance(case.body, dict) else {}
    return body.get("encoding_format") == "base64" or bool(body.get("echo"))


def test_the_document_has_every_route():
    assert {label.split()[1] for label in OPERATIONS} == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/models",
        "/v1/models/{name}", "/health", "/version", "/metrics",
    }  # fmt: skip


QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(label, mode) for label in OPERATIONS if "POST" in label for mode in (POSITIVE, NEGATIVE)]


@SCHEMA.parametrize()
@settings(QUIET, phases=[Phase.explicit])
def test_each_parameter_at_its_bounds_and_past_them(case, url):
    """The values are schemathesis' own, the same each time: hundreds for the larger bodies."""
    assert ask(case, url)


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_bodies_at_random(url, fake, label, mode):
    @settings(QUIET, max_examples=15, phases=[Phase.generate], derandomize=True)
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def check(case):
        statuses.add(ask(case, url))

    statuses = set()
    check()
    if mode is POSITIVE:
        assert 200 in statuses, statuses


def test_errors_are_documented():
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], (method, path)
            assert "ErrorBody" in str(operation["responses"]["default"])
