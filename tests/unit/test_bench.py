"""`charonia bench` and the benchmark scripts: that they run, count what they should, and measure the same work."""

import hashlib
import importlib.util
import json
import sys
from array import array
from pathlib import Path
from types import ModuleType

import pytest
from charonia.entrypoints import cli

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
}  # fmt: skip


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


# ---- workloads ----


def fingerprint(items: list[tuple[list[int], int]]) -> str:
    digest = hashlib.sha256()
    for prompt, count in items:
        digest.update(array("i", [len(prompt), *prompt, count]).tobytes())
    return digest.hexdigest()[:16]


FINGERPRINTS = {
    "chat-1000": "d7c8494b62bb5802",
    "1000/1000x256": "933632e30c8ec064",
    "2048/128x256": "028876cf0bd34478",
    "128/256x1": "c56b09674c715cc5",
    "128/256x8": "ec9f883390bf8214",
    "128/256x64": "8f213cd0515b49bc",
    "16000/64x1": "0ac838c75c00a3cc",
    "prefix2048+128/64x256": "166bbf06ffe60838",
    "nano-256": "b49f34bba5d204a1",
}


def test_workloads_are_what_other_engines_were_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("workloads", monkeypatch)
    found = {item.label: fingerprint(item.make()) for suite in module.SUITES.values() for item in suite}
    assert found == FINGERPRINTS


def test_settings_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    load("workloads", monkeypatch)
    module = load("engine", monkeypatch)
    options = module.parse(
        ["qwen06b", "--only", "128/256x1", "chat-1000", "max_num_seqs=64", "--enforce-eager", "dtype=float16"]
    )
    assert options.only == ["128/256x1", "chat-1000"]
    settings = module.engine_settings(options)
    assert (settings["max_num_seqs"], settings["dtype"], settings["max_model_len"]) == (64, "float16", 4096)
    assert settings["enforce_eager"] and settings["skip_tokenizer_init"]
    assert module.parse(["llama8b", "seed=3"]).settings == {"seed": 3}
    for bad in (["llama8b", "--only", "nano-256"], ["llama8b", "seed"], ["gpt"]):
        with pytest.raises(SystemExit):
            module.parse(bad)


# ---- charonia bench ----


def test_steps_of_the_host_alone(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    launch = "charonia.entrypoints.bench.steps.InstantExecutor.launch"
    module = sys.modules.get("charonia.entrypoints.bench.steps") or importlib.import_module(
        "charonia.entrypoints.bench.steps"
    )
    original = module.InstantExecutor.launch

    def noted(self: object, plan: object) -> object:
        plans.append(plan)
        return original(self, plan)

    monkeypatch.setattr(launch, noted)
    path = tmp_path / "figures.json"
    arguments = ["bench", "steps", str(model_dir), "--host-only", "--rows", "1", "5", "--context", "40"]
    assert cli.main([*arguments, "--steps", "12", "--json", str(path), "--max-num-batched-tokens=64"]) == 0
    figures = json.loads(path.read_text())
    assert [row["rows"] for row in figures["rows"]] == [1, 5]
    for row in figures["rows"]:
        parts = sum(row[name] for name in ("schedule", "launch", "wait", "update", "outputs"))
        assert 0.0 < parts <= row["all"] and row["device"] is None
    assert "outputs" in capsys.readouterr().out
    # The steps that were measured are the last before the rows were dropped: all rows, and no prefill.
    measured = [plan for plan in plans if len(plan.decode_rows) == 5]
    assert len(measured) >= 12 and not any(plan.chunks for plan in measured[-12:])


def test_step_cost_needs_room(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "steps", str(model_dir), "--host-only", "--rows", "2", "--context", "40"]
    assert cli.main([*arguments, "--max-model-len", "44"]) == 1
    assert "'max_model_len'" in capsys.readouterr().err


def test_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(kind in text for kind in ("throughput", "latency", "steps"))
