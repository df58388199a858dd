"""Metrics, log lines and spans of a real service with two frontends, over requests that are known."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from charonia_client import CharoniaClient
from prometheus_client.parser import text_string_to_metric_families
from support.launch import eventually
from support.otlp_collector import Collector, collecting
from support.served import TINY_FLAGS, Served, serving

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

GENERATE = "/v2/models/llm/generate"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
NUM_REQUESTS, NUM_TOKENS = 12, 7
VLLM = {
    "vllm:prompt_tokens": "counter", "vllm:generation_tokens": "counter",
    "vllm:time_to_first_token_seconds": "histogram", "vllm:time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram", "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram", "vllm:request_params_n": "histogram",
}  # fmt: skip


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def twice(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, collector: Collector
) -> Iterator[Served]:
    """A tiny model with two frontends, with everything turned on."""
    flags = (
        *TINY_FLAGS, "--instances=2", f"--otlp-traces-endpoint={collector.endpoint}",
        "--parameter=REPORT_CUSTOM_METRICS=true",
    )  # fmt: skip
    with serving(tmp_path_factory.mktemp("twice"), str(tiny_model), *flags) as served:
        yield served


def exposition(served: Served) -> str:
    return httpx.get(f"http://127.0.0.1:{served.metrics_port}/metrics", timeout=30).text


def lines(served: Served) -> list[str]:
    """What the server's log says about requests, each line's own quotes undone."""
    found = re.findall(r'"(request model=.*)"$', served.log.read_text(), re.MULTILINE)
    return [line.replace('\\"', '"') for line in found]


def test_values_add_up_over_both_frontends(twice: Served) -> None:
    before = twice.metrics()
    with CharoniaClient(twice.grpc_url) as client:
        streams = [
            client.stream(f"Number {i}", max_tokens=NUM_TOKENS, ignore_eos=True) for i in range(NUM_REQUESTS)
        ]
        for stream in streams:
            list(stream)
        client.generate("Two of them", max_tokens=NUM_TOKENS, ignore_eos=True, n=2)
    num_requests, num_sequences = NUM_REQUESTS + 1, NUM_REQUESTS + 2

    def grown() -> dict[str, float]:
        now = twice.metrics()
        return {name: now[name] - before.get(name, 0.0) for name in now}

    assert eventually(lambda: grown()["vllm:request_params_n_count"] == num_requests), grown()
    seen = grown()
    assert seen['charonia_requests_total{outcome="length"}'] == num_requests
    for name in ("vllm:generation_tokens_total", "charonia_generation_tokens_total"):
        assert seen[name] == num_sequences * NUM_TOKENS
    # One observation for each gap between the tokens of a sequence.
    gaps = num_sequences * (NUM_TOKENS - 1)
    for name in ("vllm:time_per_output_token_seconds", "charonia_inter_token_latency_seconds"):
        assert seen[name + "_count"] == seen[name + '_bucket{le="+Inf"}'] == gaps
        assert 0 < seen[name + "_sum"] < 120
    for name in (
        "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens",
        "charonia_time_to_first_token_seconds", "charonia_queue_seconds", "charonia_prefill_seconds",
        "charonia_decode_seconds", "charonia_request_seconds",
    ):  # fmt: skip
        assert seen[name + "_count"] == num_requests, name
    assert seen["vllm:request_generation_tokens_sum"] == num_sequences * NUM_TOKENS
    assert seen["vllm:request_params_n_sum"] == num_sequences
    prompt_tokens = seen["vllm:prompt_tokens_total"]
    assert prompt_tokens == seen["vllm:request_prompt_tokens_sum"] == seen["charonia_prompt_tokens_total"] > 0
    parts = ("charonia_queue_seconds_sum", "charonia_prefill_seconds_sum", "charonia_decode_seconds_sum")
    assert sum(seen[part] for part in parts) <= seen["charonia_request_seconds_sum"]


def test_the_engine_is_exported_once(twice: Served) -> None:
    twice.is_serving()
    metrics = twice.wait_idle()
    assert metrics["charonia_engine_ready"] == 1
    assert eventually(
        lambda: (
            twice.metrics()["charonia_step_seconds_count"] == twice.metrics()["charonia_step_tokens_count"]
        )
    )
    metrics = twice.metrics()
    # Every prompt token that was not cached has been computed once, every output token but each sequence's last.
    computed = metrics["charonia_prompt_tokens_total"] - metrics["charonia_prefix_cache_hits_total"]
    computed += metrics["charonia_generation_tokens_total"]
    assert computed / 2 < metrics["charonia_step_tokens_sum"] < 2 * computed
    assert metrics["charonia_prefix_cache_queries_total"] >= metrics["charonia_prefix_cache_hits_total"]


def test_families_as_a_scraper_reads_them(twice: Served) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition(twice))}
    assert {name: f.type for name, f in families.items() if name.startswith("vllm:")} == VLLM
    for name, family in families.items():
        if name.startswith(("vllm:", "charonia_")):
            assert {(s.labels["model"], s.labels["version"]) for s in family.samples} == {("llm", "1")}
    for name in VLLM:
        assert {frozenset(s.labels) - {"le"} for s in families[name].samples} == {
            frozenset({"model", "version"})
        }
    buckets = families["charonia_inter_token_latency_seconds_bucket"].samples
    counts = [s.value for s in sorted(buckets, key=lambda s: float(s.labels["le"]))]
    assert counts == sorted(counts)


def test_load_report(twice: Served) -> None:
    """The header's values, extracted as Triton's own ORCA code does; servers of release 24.10 have none yet."""
    found = re.findall(r"nv_trt_llm_kv_cache_block_metrics(?:{(.*?)})?\s*(\d+(?:\.\d+)?)", exposition(twice))
    values = {dict(re.findall(r'(\w+)="([^"]*)"', labels))["kv_cache_block_type"]: v for labels, v in found}
    assert values.keys() == {"used", "max", "tokens_per"}
    assert (float(values["max"]), float(values["tokens_per"])) == (4000, 16)


def test_a_line_a_request(twice: Served) -> None:
    for name, body in {"fine": {"max_tokens": 3, "ignore_eos": True}, "bad": {"max_tokens": -1}}.items():
        url = twice.http_url + GENERATE
        httpx.post(url, json={"text_input": "A secret", "id": f"{name} one", **body}, timeout=60)
    assert eventually(lambda: sum(' one" ' in line for line in lines(twice)) == 2), lines(twice)
    fine, bad = (line for line in lines(twice) if ' one" ' in line)
    assert 'id="fine one" outcome=length finish_reasons=length stream=false sequences=1' in fine
    assert re.search(r"generation_tokens=3 queue_s=\d\.\d+ ttft_s=\d\.\d+ total_s=\d\.\d+$", fine)
    assert 'id="bad one" outcome=invalid_arg error_code=INVALID_ARG refused=true' in bad
    assert "secret" not in twice.log.read_text()


def test_spans_hang_in_the_callers_trace(twice: Served, collector: Collector) -> None:
    body = {"text_input": "Hello", "max_tokens": 4, "ignore_eos": True, "id": "traced",
            "parameters": {"traceparent": f"00-{TRACE}-{PARENT}-01"}}  # fmt: skip
    answer = httpx.post(twice.http_url + GENERATE, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    names = {"llm_request", "queue", "prefill", "decode"}
    assert eventually(lambda: collector.spans(TRACE).keys() == names), collector.spans(TRACE)
    spans = collector.spans(TRACE)
    root = spans["llm_request"]
    assert root.parent_span_id.hex() == PARENT
    attributes = {a.key: a.value for a in root.attributes}
    assert attributes["gen_ai.request.id"].string_value == "traced"
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 4
    assert root.start_time_unix_nano == spans["queue"].start_time_unix_nano
    assert spans["decode"].end_time_unix_nano <= root.end_time_unix_nano
    assert collector.paths == {"/v1/traces"}
