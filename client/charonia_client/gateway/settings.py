"""What a gateway needs to know before it starts."""

from dataclasses import dataclass, field

from charonia_client.requests import DEFAULT_MODEL, MAX_TIMEOUT_S

AUTO = "auto"
"""Choose the parser by the model's chat template."""

MAX_BODY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """How to reach the model and how to serve it.

    triton: the server's gRPC address. model: its name in the server. served_model_names: the names by which
    clients ask for it, the first of which is reported; the model's own name where empty. api_keys: with at least
    one, every route but /health wants one of them. tool_parser, reasoning_parser: see `gateway.parsers`; "auto"
    chooses by the chat template, None turns it off. allowed_origins: web pages of other origins that may call
    the API ("*": all). max_body_bytes: longest request body. request_timeout_s: longest time that a request may
    take; None is no limit. chat_page: serve the page at "/". open_chat_page: serve it without an API key (it
    holds no secret, and asks its user for the key). prompt_tokens_details: report cached tokens in the usage of
    streams too; the usage of whole answers always has them. otlp_traces_endpoint: an OpenTelemetry collector, such as
    ``http://localhost:4318``, that gets a span of each request; None is no tracing. recommended_sampling: what a
    request leaves open is sampled as the checkpoint's generation_config.json recommends.
    """

    triton: str = "localhost:8001"
    model: str = DEFAULT_MODEL
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    tool_parser: str | None = AUTO
    reasoning_parser: str | None = AUTO
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    request_timeout_s: float | None = None
    chat_page: bool = True
    open_chat_page: bool = False
    prompt_tokens_details: bool = False
    otlp_traces_endpoint: str | None = None
    recommended_sampling: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for values that would close the gateway to everybody, or open it."""
        if any(not key or any(map(str.isspace, key)) for key in self.api_keys):
            raise ValueError("an API key must not be empty or have white space in it")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        if self.request_timeout_s is not None and not 0 < self.request_timeout_s < MAX_TIMEOUT_S:
            raise ValueError(f"request_timeout_s must be a positive number, got {self.request_timeout_s}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which clients may ask for the model."""
        return self.served_model_names or (self.model,)
