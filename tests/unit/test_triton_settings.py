"""config.pbtxt, model.json and the runtime folder: what is read, what is refused and why."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.triton.contract import INPUTS, OUTPUTS, TensorSpec, complete_config
from charonia.triton.runtime_dir import make_runtime_dir
from charonia.triton.settings import BackendOptions, InstanceInfo, pin_device, read_engine_config

ROOT = Path(__file__).resolve().parents[2]


def instance(tmp_path: Path, kind: str = "MODEL", model_json: Any = None, device_id: int = 0) -> InstanceInfo:
    if model_json is not None:
        text = model_json if isinstance(model_json, str) else json.dumps(model_json)
        (tmp_path / "model.json").write_text(text)
    return InstanceInfo(
        model_name="llm", model_version="1", instance_name="llm_0_0", kind=kind, device_id=device_id,
        version_dir=tmp_path, parameters={},
    )  # fmt: skip


def read(info: InstanceInfo) -> EngineConfig:
    return read_engine_config(info, lambda: Path("/cache/default-model"))


def complaint(info: InstanceInfo) -> str:
    with pytest.raises(ConfigError) as caught:
        read(info)
    return str(caught.value)


def test_instance_info() -> None:
    parameters = {"response_senders": {"string_value": "3"}}
    args = {
        "model_config": json.dumps({"model_transaction_policy": {"decoupled": True}, "parameters": parameters}),
        "model_instance_kind": "GPU", "model_instance_name": "llm_0_1", "model_instance_device_id": "2",
        "model_repository": "/models/llm", "model_version": "3", "model_name": "llm",
    }  # fmt: skip
    info = InstanceInfo.from_args(args)
    assert info.version_dir == Path("/models/llm/3")
    assert info.parameters == {"response_senders": "3"}
    assert info.engine_identity == "llm/3/gpu2"
    with pytest.raises(ConfigError, match="decoupled"):
        InstanceInfo.from_args(args | {"model_config": "{}"})


def test_model_json(tmp_path: Path) -> None:
    assert read(instance(tmp_path, model_json={"model": "default"})).model == "/cache/default-model"
    assert read(instance(tmp_path, model_json={"model": "/abs", "tokenizer": "tok"})) == EngineConfig(
        model="/abs", tokenizer=str(tmp_path / "tok")
    )
    relative = read(
        instance(tmp_path, model_json={"model": "weights", "max_num_seqs": 3, "dtype": "bfloat16"})
    )
    assert relative == EngineConfig(model=str(tmp_path / "weights"), max_num_seqs=3, dtype="bfloat16")


def test_a_wrong_model_json_says_what_is_wrong(tmp_path: Path) -> None:
    assert "model.json is missing" in complaint(instance(tmp_path))
    assert "JSON" in complaint(instance(tmp_path, model_json="{"))
    assert "JSON object" in complaint(instance(tmp_path, model_json=[]))
    assert "'tensor_paralel_size'" in complaint(
        instance(tmp_path, model_json={"model": "m", "tensor_paralel_size": 2})
    )
    assert "model" in complaint(instance(tmp_path, model_json={}))


def test_a_path_that_this_python_cannot_open_is_told_as_such(tmp_path: Path) -> None:
    """In a stub that is every one outside ASCII; here, one that is no text."""
    assert "cannot open '/m\\ud800'" in complaint(instance(tmp_path, model_json='{"model": "/m\\ud800"}'))
    assert "'tokenizer'" in complaint(instance(tmp_path, model_json={"model": "/m", "tokenizer": "\ud800"}))


def test_the_instance_kind_decides_on_the_device(tmp_path: Path) -> None:
    settings = {"model": "m"}
    assert read(instance(tmp_path, "MODEL", settings)).device == "auto"
    assert read(instance(tmp_path, "CPU", settings)).device == "cpu"
    assert read(instance(tmp_path, "GPU", settings)).device == "cuda"
    assert "KIND_CPU" in complaint(instance(tmp_path, "CPU", settings | {"device": "cuda"}))
    assert "please specify KIND_MODEL" in complaint(
        instance(tmp_path, "GPU", settings | {"tensor_parallel_size": 2})
    )
    assert "please specify KIND_MODEL" in complaint(
        instance(tmp_path, "GPU", settings | {"pipeline_parallel_size": "2"})
    )


def test_vllms_settings_without_effect_are_told_of(tmp_path: Path) -> None:
    told: list[str] = []
    info = instance(tmp_path, model_json={"model": "/m", "swap_space": 4, "revision": None})
    assert read_engine_config(info, Path, told.append) == EngineConfig(model="/m")
    assert ["swap_space" in text for text in told] == [True]


def test_pinning(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    pin_device(instance(tmp_path, "MODEL", device_id=1), environment)
    assert environment == {}
    pin_device(instance(tmp_path, "GPU", device_id=1), environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
    restricted = {"CUDA_VISIBLE_DEVICES": "4,GPU-abc"}
    pin_device(instance(tmp_path, "GPU", device_id=1), restricted)
    assert restricted == {"CUDA_VISIBLE_DEVICES": "GPU-abc"}
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        pin_device(instance(tmp_path, "GPU", device_id=2), {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_what_is_reported() -> None:
    assert BackendOptions.from_parameters({}).log_requests == "summary"
    assert not BackendOptions.from_parameters({}).report_custom_metrics
    for text in ("true", "True", "yes"):
        assert BackendOptions.from_parameters({"REPORT_CUSTOM_METRICS": text}).report_custom_metrics
    assert not BackendOptions.from_parameters({"REPORT_CUSTOM_METRICS": "no"}).report_custom_metrics
    assert BackendOptions.from_parameters({"log_requests": "full"}).log_requests == "full"
    with pytest.raises(ConfigError, match="'log_requests': must be one of off, summary, full"):
        BackendOptions.from_parameters({"log_requests": "everything"})
    with pytest.raises(ConfigError, match="REPORT_CUSTOM_METRICS"):
        BackendOptions.from_parameters({"REPORT_CUSTOM_METRICS": "maybe"})


def test_gpu_device_ids(tmp_path: Path) -> None:
    def pinned(kind: str, ids: str, visible: str = "") -> str:
        environment = {"CUDA_VISIBLE_DEVICES": visible}
        info = instance(tmp_path, kind)
        pin_device(dataclasses.replace(info, parameters={"GPU_DEVICE_IDS": ids}), environment)
        return environment["CUDA_VISIBLE_DEVICES"]

    assert pinned("MODEL", " 1, 0 ") == "1,0"
    assert pinned("MODEL", "2,0", "7,8,9") == "9,7"
    assert pinned("MODEL", "") == ""
    assert pinned("GPU", "3") == "0"
    assert pinned("CPU", "3") == ""
    for ids in ("x", "-1", "0,0", "0,00", "1,", "²"):
        with pytest.raises(ConfigError, match="'GPU_DEVICE_IDS'"):
            pinned("MODEL", ids)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        pinned("MODEL", "2", "4,5")


def test_backend_options() -> None:
    assert BackendOptions.from_parameters({"EXECUTION_ENV_PATH": "x"}) == BackendOptions()
    options = BackendOptions.from_parameters(
        {
            "response_senders": "4", "cancel_final_delay_ms": "0", "drain_timeout_s": "2.5", "runtime_dir": "/run/x",
            "ignored_request_parameters": "x-trace, x-user",
        }
    )  # fmt: skip
    assert options == BackendOptions(
        response_senders=4, cancel_final_delay_ms=0, drain_timeout_s=2.5, runtime_dir=Path("/run/x"),
        ignored_request_parameters=frozenset({"x-trace", "x-user"}),
    )  # fmt: skip
    for name, value in {
        "response_senders": "0",
        "cancel_final_delay_ms": "-1",
        "drain_timeout_s": "nan",
    }.items():
        with pytest.raises(ConfigError, match=f"'{name}'"):
            BackendOptions.from_parameters({name: value})


def test_the_shipped_config_declares_the_contract() -> None:
    config = (ROOT / "model_repository" / "llm" / "config.pbtxt").read_text()
    for kind, specs in (("input", INPUTS), ("output", OUTPUTS)):
        block = re.search(rf"^{kind} \[$(.*?)^\]$", config, re.MULTILINE | re.DOTALL)
        assert block is not None
        pattern = r'name: "(\w+)" data_type: (\w+) dims: \[ (-?\d+) \]( optional: true)?'
        found = [
            TensorSpec(name, data_type, (int(dim),), optional=bool(optional) or kind == "output")
            for name, data_type, dim, optional in re.findall(pattern, block[1])
        ]
        assert found == list(specs)


class ModelConfig:
    """`pb_utils.ModelConfig`, as far as it goes here."""

    def __init__(self, **declared: Any) -> None:
        self.values: dict[str, Any] = {"input": [], "output": []} | declared

    def as_dict(self) -> dict[str, Any]:
        return self.values

    def add_input(self, declaration: dict[str, Any]) -> None:
        self.values["input"].append(declaration)

    def add_output(self, declaration: dict[str, Any]) -> None:
        self.values["output"].append(declaration)

    def set_model_transaction_policy(self, policy: dict[str, Any]) -> None:
        self.values["policy"] = policy

    def set_max_batch_size(self, max_batch_size: int) -> None:
        self.values["max_batch_size"] = max_batch_size


def test_auto_completion_adds_what_is_missing_and_leaves_the_rest() -> None:
    own = {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": False}
    config = ModelConfig(input=[own])
    assert complete_config(config) is config
    assert config.values["input"][0] is own
    assert [entry["name"] for entry in config.values["input"]].count("stream") == 1
    assert {entry["name"] for entry in config.values["input"]} == {spec.name for spec in INPUTS}
    assert {entry["name"] for entry in config.values["output"]} == {spec.name for spec in OUTPUTS}
    assert config.values["policy"] == {"decoupled": True}
    assert config.values["max_batch_size"] == 0


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder whose name leaves room for sockets, as pytest's own do not."""
    with tempfile.TemporaryDirectory(prefix="charonia-test-") as name:
        yield Path(name)


def test_the_runtime_folder_is_private(short_tmp: Path) -> None:
    folder = make_runtime_dir(None, server_pid=os.getpid(), model="llm/1", tmp=short_tmp)
    assert folder.parent == short_tmp / f"charonia-{os.getuid()}" / str(os.getpid())
    for path in (folder, folder.parent, folder.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert make_runtime_dir(None, server_pid=os.getpid(), model="llm/1", tmp=short_tmp) == folder
    assert make_runtime_dir(None, server_pid=os.getpid(), model="llm/2", tmp=short_tmp) != folder
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="this user alone"):
        make_runtime_dir(None, server_pid=os.getpid(), model="llm/1", tmp=short_tmp)


def test_a_planted_link_is_no_runtime_folder(short_tmp: Path) -> None:
    (short_tmp / "elsewhere").mkdir(mode=0o700)
    (short_tmp / f"charonia-{os.getuid()}").symlink_to(short_tmp / "elsewhere")
    with pytest.raises(ConfigError, match="this user alone"):
        make_runtime_dir(None, server_pid=1, model="llm/1", tmp=short_tmp)


def test_folders_of_dead_servers_are_cleared_away(short_tmp: Path) -> None:
    dead = short_tmp / f"charonia-{os.getuid()}" / str(2**22 + 1)
    make_runtime_dir(None, server_pid=os.getpid(), model="llm/1", tmp=short_tmp)
    dead.mkdir()
    (dead / "engine.sock").write_text("")
    folder = make_runtime_dir(None, server_pid=os.getpid(), model="llm/1", tmp=short_tmp)
    assert not dead.exists()
    assert folder.exists()


def test_a_runtime_folder_of_ones_own(short_tmp: Path) -> None:
    assert make_runtime_dir(short_tmp / "mine", server_pid=1, model="llm/1").parent == short_tmp / "mine"
    with pytest.raises(ConfigError, match="absolute"):
        make_runtime_dir(Path("run"), server_pid=1, model="llm/1")
    with pytest.raises(ConfigError, match="too long"):
        make_runtime_dir(short_tmp / ("x" * 80), server_pid=1, model="llm/1")
