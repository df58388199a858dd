"""Every metric family that a model exports, declared once: name, type, help, labels, buckets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from charonia.core.stats import STEP_SECONDS, STEP_SEQUENCES, STEP_TOKENS
from charonia.serving.metrics import INTER_TOKEN_SECONDS

Kind = Literal["counter", "gauge", "histogram", "buckets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric family; its series also have the labels model and version.

    kind: "buckets" is a histogram whose observations are counted by us and exported as sums, one counter family each
    for `_bucket`, `_sum` and `_count`. The samples are those of a histogram, at a price that does not depend on the
    number of observations; only the types that the exposition states for them are counters.
    label: what tells its series apart, if it has several. values: series that exist from the start; a rate needs
    their zeros. bounds: upper ends of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Names of the samples, as queries see them."""
        if self.kind in ("histogram", "buckets"):
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)


ORCA_FAMILY = "nv_trt_llm_kv_cache_block_metrics"
"""The family from which Triton itself makes the load report in its ORCA response header."""

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip


def _counter(name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Family:
    return Family(name=name, kind="counter", help=text, label=label, values=values)


def _gauge(name: str, text: str) -> Family:
    return Family(name=name, kind="gauge", help=text)


def _seconds(name: str, text: str) -> Family:
    return Family(name=name, kind="histogram", help=text, bounds=_SECONDS)


def _buckets(name: str, text: str, bounds: tuple[float, ...]) -> Family:
    return Family(name=name, kind="buckets", help=text, bounds=bounds)


FRONTEND_FAMILIES = (
    _counter(
        "charonia_requests_total",
        "Requests that ended, by outcome: how they finished, or the error that ended them",
        "outcome",
        ("stop", "length", "cancelled", "internal", "unavailable"),
    ),
    _counter(
        "charonia_requests_refused_total",
        "Requests that the engine did not take, by error code",
        "code",
        ("INVALID_ARG", "UNSUPPORTED", "UNAVAILABLE"),
    ),
    _counter("charonia_prompt_tokens_total", "Prompt tokens of requests whose first token has come"),
    _counter("charonia_generation_tokens_total", "Tokens generated"),
    _seconds("charonia_time_to_first_token_seconds", "From a request's arrival to its first token"),
    _seconds("charonia_queue_seconds", "From a request's arrival to its first step"),
    _seconds("charonia_prefill_seconds", "From a request's first step to its first token"),
    _seconds(
        "charonia_decode_seconds", "From a request's first token to its last, of requests that ended well"
    ),
    _seconds(
        "charonia_request_seconds",
        "From a request's arrival to its last response, of requests that ended well",
    ),
    _buckets(
        "charonia_inter_token_latency_seconds", "Time between the tokens of a sequence", INTER_TOKEN_SECONDS
    ),
)
"""What each frontend sees; the series of a model's instances add up."""

ENGINE_FAMILIES = (
    _gauge("charonia_engine_ready", "1 while the engine takes requests, else 0"),
    _gauge("charonia_requests_running", "Requests that have a place in the running batch"),
    _gauge("charonia_requests_waiting", "Requests that wait for a place in the running batch"),
    _gauge("charonia_kv_cache_blocks_used", "KV-cache blocks that live requests hold"),
    _gauge("charonia_kv_cache_blocks_total", "KV-cache blocks there are"),
    _gauge("charonia_kv_cache_usage_ratio", "Share of the KV-cache blocks that live requests hold"),
    _counter("charonia_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache"),
    _counter("charonia_prefix_cache_hits_total", "Prompt tokens found in the prefix cache"),
    _counter(
        "charonia_preemptions_total", "Times a running request gave up its KV-cache blocks and started over"
    ),
    _buckets("charonia_step_seconds", "From the launch of an engine step to its result", STEP_SECONDS),
    _buckets("charonia_step_tokens", "Tokens that a step computes, prompt and output", STEP_TOKENS),
    _buckets("charonia_step_sequences", "Sequences that a step advances", STEP_SEQUENCES),
    Family(
        name=ORCA_FAMILY,
        kind="gauge",
        help="Blocks of the KV cache in use and in all, and tokens per block",
        label="kv_cache_block_type",
        values=("used", "max", "tokens_per"),
    ),
)
"""What describes the engine; one instance exports it for all."""

_VLLM_REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_VLLM_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
VLLM_INTER_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


def vllm_families(max_model_len: int) -> Sequence[Family]:
    """The families of Triton's vLLM backend, as it declares them for a model of that context length."""
    lengths = buckets_1_2_5(max_model_len)

    def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Family:
        return Family(name=name, kind="histogram", help=text, bounds=bounds)

    return (
        _counter("vllm:prompt_tokens_total", "Prompt tokens of requests whose first token has come"),
        _counter("vllm:generation_tokens_total", "Tokens generated"),
        histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token",
            _VLLM_FIRST_TOKEN_SECONDS,
        ),
        histogram(
            "vllm:time_per_output_token_seconds",
            "Time between the tokens of a sequence",
            VLLM_INTER_TOKEN_SECONDS,
        ),
        histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its last response",
            _VLLM_REQUEST_SECONDS,
        ),
        histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", lengths),
        histogram("vllm:request_generation_tokens", "Tokens generated for a request", lengths),
        histogram("vllm:request_params_n", "Sequences that a request asks for", (1, 2, 5, 10, 20)),
    )


def buckets_1_2_5(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to `most`."""
    bounds: list[float] = []
    scale = 1
    while scale <= most:
        bounds += [factor * scale for factor in (1, 2, 5) if factor * scale <= most]
        scale *= 10
    return tuple(bounds)
