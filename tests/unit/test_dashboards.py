"""Dashboard and rules ask for metrics that exist, with labels that they have."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from charonia.triton.metric_families import ENGINE_FAMILIES, FRONTEND_FAMILIES, Family
from charonia_client.gateway.observe import GatewayMetrics

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus/rules.yml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())

FAMILIES: dict[str, Family] = {
    name: family for family in FRONTEND_FAMILIES + ENGINE_FAMILIES for name in family.exported_names
}
GATEWAY: dict[str, set[str]] = {
    name: set(metric._labelnames) | ({"le"} if name.endswith("_bucket") else set())
    for metric, names in GatewayMetrics().registry._collector_to_names.items()
    for name in names
}
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
SCRAPE_LABELS = {"model", "version", "instance", "job"}

_SELECTOR = re.compile(r"(?<![\w:])((?:\w+:)?charonia_\w+(?::\w+)?|up)\b(?:\{([^}]*)\})?(?!\s*\()")


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for group in RULES["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", list(expressions()))
def test_metrics_and_labels_exist(expression: str) -> None:
    selectors = _SELECTOR.findall(expression)
    assert selectors, "no metric in it"
    allowed = set(SCRAPE_LABELS)
    for name, matchers in selectors:
        labels = set(SCRAPE_LABELS)
        if name in GATEWAY:
            labels |= GATEWAY[name]
        elif name in FAMILIES:
            labels |= {FAMILIES[name].label} | ({"le"} if name.endswith("_bucket") else set())
        else:
            assert name in RECORDED | {"up"}, name
        allowed |= labels
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels
    for group in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= allowed
    # A quantile needs the buckets by their bounds, a rate needs a counter.
    assert ("histogram_quantile" in expression) <= bool(re.search(r"by \([^)]*\ble\b", expression))
    for name in re.findall(r"rate\((\w+)", expression):
        assert name in GATEWAY or FAMILIES[name].kind != "gauge"
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_can_be_imported() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables == {"datasource", "model", "instance"}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not own & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= own
        assert all(t["datasource"]["uid"] == "${datasource}" for t in panel.get("targets", []))


def test_every_family_of_ours_is_on_the_dashboard() -> None:
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))
    # The counts of blocks are shown as the share in use.
    left_out = {"charonia_kv_cache_blocks_used", "charonia_kv_cache_blocks_total"}
    for family in FRONTEND_FAMILIES + ENGINE_FAMILIES:
        if family.name.startswith("charonia_") and family.name not in left_out:
            assert family.name in shown, family.name


def test_rules_are_complete() -> None:
    names = [rule.get("record") or rule["alert"] for group in RULES["groups"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    alerts = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) >= 6
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"]) and rule["annotations"]["summary"]


def test_prometheus_finds_rules_and_servers() -> None:
    assert [Path(path).name for path in PROMETHEUS["rule_files"]] == ["rules.yml"]
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in PROMETHEUS["scrape_configs"]}
    assert jobs["charonia"] == ["triton:8002"]
    for path in DOCKER.glob("grafana/provisioning/*/*.yaml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1


BUSY = {
    'charonia_requests_total{outcome="stop"}': "0+6x30",
    'charonia_requests_total{outcome="error"}': "0+1x30",
    'charonia_requests_refused_total{code="UNAVAILABLE"}': "0+1x30",
    'charonia_preemptions_total{gpu="0"}': "0+2x30",
    "charonia_requests_waiting": "1+1x30",
    "charonia_kv_cache_usage_ratio": "0.97x30",
    "charonia_engine_ready": "0x30",
    'charonia_time_to_first_token_seconds_bucket{le="5"}': "0x30",
    'charonia_time_to_first_token_seconds_bucket{le="10"}': "0+7x30",
    'charonia_time_to_first_token_seconds_bucket{le="+Inf"}': "0+7x30",
    "up": "0x30",
}
CALM = {
    'charonia_requests_total{outcome="stop"}': "0+60x30",
    'charonia_requests_total{outcome="error"}': "0+1x30",
    'charonia_requests_total{outcome="cancelled"}': "0+60x30",
    'charonia_requests_refused_total{code="INVALID_ARG"}': "0+60x30",
    'charonia_preemptions_total{gpu="0"}': "0+1x30",
    "charonia_requests_waiting": "9-1x9 0x20",
    "charonia_kv_cache_usage_ratio": "0.9x30",
    "charonia_engine_ready": "1x30",
    'charonia_time_to_first_token_seconds_bucket{le="5"}': "0+61x30",
    'charonia_time_to_first_token_seconds_bucket{le="+Inf"}': "0+61x30",
    "up": "1x30",
}
"""Samples a minute, of a server about which all is wrong and of one that does its work."""


@pytest.mark.parametrize(("samples", "all_fire"), [(BUSY, True), (CALM, False)], ids=["busy", "calm"])
def test_alerts_fire_when_they_should(tmp_path: Path, samples: dict[str, str], all_fire: bool) -> None:
    """By Prometheus's own evaluation of the rules."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    place = {"job": "charonia", "instance": "triton:8002"}
    labels = ", ".join(
        f'{key}="{value}"' for key, value in (place | {"model": "llm", "version": "1"}).items()
    )
    series = [
        {"series": f"{name.rstrip('}')}{', ' if '{' in name else '{'}{labels}}}", "values": values}
        for name, values in samples.items()
    ]
    alerts = [rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    fired = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts if all_fire]
    unit = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [{"expr": query, "eval_time": "25m", "exp_samples": fired}],
    }
    file = tmp_path / "alerts.yml"
    file.write_text(json.dumps({"rule_files": [str(DOCKER / "prometheus/rules.yml")], "tests": [unit]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
