"""docker/: what linters and schemas say, and whether the files agree with each other and with the commands they run."""

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from charonia.entrypoints import serve
from charonia.entrypoints.cli import main as charonia
from charonia.triton.metric_families import ENGINE_FAMILIES
from charonia_client.cli_options import build_parser as client_parser

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
MANIFESTS = DOCKER / "kubernetes"
EXIT_MARGIN_S = 10
"""What a server may take beyond its exit timeout."""


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed (extra `dev`)")
    return found


def serve_arguments(arguments: list[str]) -> argparse.Namespace:
    """What `charonia serve` understands; what it does not ends the test."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


# ---- Dockerfiles ----


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint(dockerfile: Path) -> None:
    command = [tool("hadolint"), "--config", str(DOCKER / "hadolint.yaml"), str(dockerfile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_made_of_files_that_are_there_and_runs_as_nobody_special(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--from).*$", text, re.MULTILINE)]
    sources = {source for sources in copied for source in sources}
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert sources == admitted
    assert all((ROOT / source).exists() for source in sources)
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert "HEALTHCHECK" in final


# ---- Compose ----


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The services of both files together, as Compose understands them."""
    files = [f"--file={DOCKER / name}" for name in ("compose.yaml", "compose.gpu.yaml")]
    command = [tool("docker-compose"), *files, "config", "--format=json"]
    environment = {**os.environ, "MODEL": "/models/one"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def test_services_are_hardened_and_publish_on_loopback(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"triton", "gateway", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
    assert "ports" not in compose["services"]["triton"]
    assert list(compose["services"]["triton"]["networks"]) == ["inner"]
    assert compose["networks"]["inner"]["internal"]
    assert compose["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]


def test_mounted_files_are_there(compose: dict[str, Any]) -> None:
    volumes = [volume for service in compose["services"].values() for volume in service.get("volumes", [])]
    bound = [volume for volume in volumes if volume["type"] == "bind" and volume["source"] != "/models/one"]
    assert len(bound) >= 3
    for volume in bound:
        assert Path(volume["source"]).exists(), volume["source"]
        assert volume["read_only"]


def test_prometheus_scrapes_services_that_are_there(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert sorted(targets) == ["gateway:9000", "triton:8002"]
    assert {target.partition(":")[0] for target in targets} <= set(compose["services"])


def test_compose_runs_commands_that_exist(compose: dict[str, Any]) -> None:
    gateway = client_parser().parse_args(compose["services"]["gateway"]["command"])
    assert (gateway.triton, gateway.port) == ("triton:8001", 9000)
    triton = serve_arguments(compose["services"]["triton"]["command"])
    assert triton.model == "/model"
    grace_s = compose["services"]["triton"]["stop_grace_period"]
    assert grace_s == "1m15s"
    assert triton.exit_timeout + EXIT_MARGIN_S <= 75


def test_images_run_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {path.stem: path.read_text() for path in DOCKERFILES}
    arguments = json.loads(re.findall(r"^CMD (.*)$", commands["gateway"], re.MULTILINE)[-1])
    assert client_parser().parse_args(arguments).command == "gateway"
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", commands["server"], re.MULTILINE)[-1])
    assert entry[:4] == ["tini", "--", "charonia", "serve"]
    assert serve_arguments([*entry[4:], "/model"]).host == "0.0.0.0"
    with pytest.raises(SystemExit) as caught:
        charonia(["install-backend", "--help"])
    assert caught.value.code == 0


# ---- Kubernetes ----


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]:
        for document in yaml.safe_load_all((MANIFESTS / name).read_text()):
            yield name, document


MANIFEST = dict(documents())


def test_kustomization_lists_every_manifest() -> None:
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}
    assert set(MANIFEST) == {path.name for path in MANIFESTS.iterdir()} - others


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_manifests_are_valid(name: str) -> None:
    kubernetes_validate.validate(MANIFEST[name], "1.31", strict=True)


def containers() -> dict[str, dict[str, Any]]:
    pod = MANIFEST["deployment.yaml"]["spec"]["template"]["spec"]
    return {container["name"]: container for container in pod["containers"]}


def test_pods_are_hardened() -> None:
    pod = MANIFEST["deployment.yaml"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in containers().values():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        ports = {port["name"] for port in container["ports"]}
        probes = [container[probe] for probe in ("readinessProbe", "livenessProbe")]
        for probe in probes:
            assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in ports


def test_pods_run_commands_that_exist_and_have_time_to_drain() -> None:
    triton = serve_arguments(containers()["triton"]["args"])
    gateway = client_parser().parse_args(containers()["gateway"]["args"])
    pod = MANIFEST["deployment.yaml"]["spec"]["template"]["spec"]
    (sleep, seconds) = containers()["triton"]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    longest_s = max(triton.exit_timeout, gateway.drain_timeout)
    assert int(seconds) + longest_s + EXIT_MARGIN_S <= pod["terminationGracePeriodSeconds"]


def test_the_autoscaler_reads_a_metric_that_is_exported() -> None:
    (metric,) = MANIFEST["autoscaler.yaml"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {family.name for family in ENGINE_FAMILIES if family.kind == "gauge"}
    (rule,) = yaml.safe_load((MANIFESTS / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")


def test_selectors_name_the_pods() -> None:
    labels = MANIFEST["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFEST["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFEST["service.yaml"]["spec"]["selector"] == labels
    assert MANIFEST["disruption-budget.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFEST["network-policy.yaml"]["spec"]["podSelector"]["matchLabels"] == labels
    names = {port["name"] for container in containers().values() for port in container["ports"]}
    assert {port["targetPort"] for port in MANIFEST["service.yaml"]["spec"]["ports"]} <= names


def test_the_network_policy_keeps_tritons_own_ports_closed() -> None:
    rules = MANIFEST["network-policy.yaml"]["spec"]["ingress"]
    open_to_all = [port["port"] for rule in rules if "from" not in rule for port in rule["ports"]]
    assert open_to_all == ["openai"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == {"openai", "metrics"}
