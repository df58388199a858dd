"""The command line, and the model repository that it builds."""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from charonia.config import EngineConfig
from charonia.entrypoints import cli
from charonia.entrypoints.deployment import Deployment, ServeSettings
from charonia.entrypoints.engine_flags import add_engine_flags, engine_settings
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.progress import Progress
from charonia.entrypoints.repository import build_repository, check_checkpoint, configure, find_template
from charonia.entrypoints.serve import ready_message
from charonia.entrypoints.triton_server import TritonServer
from charonia.errors import ConfigError
from support.launch import LAUNCH_MODEL, make_checkpoint


class TestEngineFlags:
    def parse(self, *arguments: str) -> dict[str, object]:
        parser = argparse.ArgumentParser()
        add_engine_flags(parser)
        return engine_settings(parser.parse_args(arguments))

    def test_only_what_was_given(self) -> None:
        assert self.parse() == {}
        given = self.parse("--dtype=bfloat16", "--max-model-len", "512", "--no-enable-prefix-caching")
        assert given == {"dtype": "bfloat16", "max_model_len": 512, "enable_prefix_caching": False}
        assert EngineConfig.from_mapping({"model": "m", **given}).max_model_len == 512

    def test_every_setting_has_its_flag_and_text(self) -> None:
        parser = argparse.ArgumentParser()
        add_engine_flags(parser)
        text = parser.format_help()
        for field in msgspec.structs.fields(EngineConfig):
            flag = f"--{field.name.replace('_', '-')}"
            assert (flag in text) == (field.name not in ("model", "quantization")), flag
        assert "Most sequences that run at once" in " ".join(text.split())
        assert "(default 256)" in text

    def test_wrong_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.parse("--dtype=int3")
        assert "invalid choice: 'int3'" in capsys.readouterr().err


def test_the_example_is_one_that_the_model_can_answer(tmp_path: Path) -> None:
    for name, route in (("LlamaForCausalLM", "/generate_stream"), ("BertModel", "/generate")):
        folder = tmp_path / name
        folder.mkdir()
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
        config = {**sizes, "architectures": [name], "vocab_size": 100, "max_position_embeddings": 64}
        if name == "BertModel":
            config |= {"type_vocab_size": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
        (folder / "config.json").write_text(json.dumps(config))
        text = ready_message(ServeSettings(model=str(folder)), TritonServer(tmp_path), 1.0)
        command = next(line for line in text.splitlines() if "curl" in line)
        body = json.loads(shlex.split(command)[-1])
        assert f"/v2/models/llm{route} " in command and ("embedding_request" in body) == (name == "BertModel")


class TestRepository:
    def test_build(self, tmp_path: Path) -> None:
        model = build_repository(
            tmp_path / "repository",
            model_name="other",
            settings={"model": "/m", "dtype": "float32"},
            instances=3,
            runtime_dir=Path('/tmp/with "quotes"'),
            parameters={"log_requests": "off"},
            template=LAUNCH_MODEL,
        )
        config = (model / "config.pbtxt").read_text()
        assert model == tmp_path / "repository" / "other"
        assert 'name: "other"' in config
        assert "count: 3" in config
        assert r'key: "runtime_dir" value { string_value: "/tmp/with \"quotes\"" }' in config
        assert 'parameters { key: "log_requests" value { string_value: "off" } }' in config
        assert json.loads((model / "1" / "model.json").read_text()) == {"model": "/m", "dtype": "float32"}
        assert (model / "1" / "model.py").read_text() == (LAUNCH_MODEL / "1" / "model.py").read_text()

    def test_template_of_this_project(self) -> None:
        template = find_template()
        config = configure(
            (template / "config.pbtxt").read_text(), model_name="m", instances=2, runtime_dir=Path("/r")
        )
        assert re.search(r"(?m)^instance_group \[ \{ count: 2 ", config)
        again = configure(config, model_name="llm", instances=1, runtime_dir=Path("/r2"))
        assert again.count('key: "runtime_dir"') == 1
        assert '"/r2"' in again

    def test_template_without_count(self) -> None:
        with pytest.raises(ValueError, match="instance_group"):
            configure('name: "llm"', model_name="llm", instances=1, runtime_dir=Path("/r"))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no config.json"),
            ({"config.json": "{"}, "cannot be read"),
            ({"config.json": "[]"}, "JSON object"),
            ({"config.json": "{}"}, "no .*safetensors"),
        ],
    )
    def test_unfit_checkpoints(self, tmp_path: Path, files: dict[str, str], message: str) -> None:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(LaunchError, match=message):
            check_checkpoint(str(tmp_path))
        if message.startswith("no ."):
            assert check_checkpoint(str(tmp_path), needs_weights=False) == tmp_path
        with pytest.raises(LaunchError, match=r"no such directory\n.*not downloaded by name"):
            check_checkpoint("Qwen/Qwen3-0.6B")

    def test_deployment_checks_before_it_writes(self, tmp_path: Path) -> None:
        model = str(make_checkpoint(tmp_path / "model"))
        with pytest.raises(ConfigError, match="max_num_seqs"):
            Deployment(ServeSettings(model=model, engine={"max_num_seqs": 0}))
        with pytest.raises(LaunchError, match="--model-name"):
            Deployment(ServeSettings(model=model, model_name="../up"))
        with Deployment(ServeSettings(model=model)) as deployment:
            assert deployment.folder.stat().st_mode & 0o777 == 0o700
            deployment.make_server()
            assert deployment.runtime_dir.stat().st_mode & 0o777 == 0o700
        assert not deployment.folder.exists()

    def test_folders_are_named_as_the_stubs_can_open_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The embedded Python of a stub takes ASCII alone, and reads relative names from the model's folder."""
        model, tokenizer = make_checkpoint(tmp_path / "modèle"), make_checkpoint(tmp_path / "tokenizer")
        monkeypatch.chdir(tmp_path)
        with Deployment(ServeSettings(model="modèle", engine={"tokenizer": "tokenizer"})) as deployment:
            settings = json.loads((deployment.folder / "repository/llm/1/model.json").read_text())
            assert settings["model"].isascii() and Path(settings["model"]).resolve() == model
            assert settings["tokenizer"] == str(tokenizer)
        assert model.is_dir()


class TestCommand:
    def test_errors_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["serve", str(tmp_path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"charonia: MODEL {tmp_path}: no config.json")
        assert "Traceback" not in err
        assert cli.main(["serve", str(tmp_path), "--verbose"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_engine_settings_are_checked_early(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["serve", str(make_checkpoint(tmp_path / "m")), "--max-num-seqs=0"]) == 1
        assert "'max_num_seqs' must be a positive integer" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [
            [], ["serv"], ["serve", "--instances=0"], ["serve", "--http-port=x"], ["serve", "--parameter=x"],
            ["serve", "--parameter=runtime_dir=/tmp"],
        ],
    )  # fmt: skip
    def test_bad_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: charonia" in capsys.readouterr().err

    def test_version_and_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["--version"], ["--help"], ["serve", "--help"], ["demo", "--help"]):
            with pytest.raises(SystemExit) as caught:
                cli.main(arguments)
            assert caught.value.code == 0
        assert "stream a chat answer" in capsys.readouterr().out

    def test_missing_extra(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(cli, "_COMMANDS", {"demo": ("package_that_is_away", "Text.")})
        assert cli.main(["demo"]) == 1
        assert "needs the package package_that_is_away; install it: pip" in capsys.readouterr().err

    def test_commands_load_no_torch(self) -> None:
        modules = ["serve", "demo", "fetch_model", "cli", "triton_server"]
        code = "".join(f"import charonia.entrypoints.{module}\n" for module in modules)
        code += "import sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class TestProgress:
    def test_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        progress = Progress(stream)
        progress.update()
        progress.begin("Loading")
        progress.update()
        progress.say("a line")
        progress.end()
        assert stream.getvalue() == "Loading ...\na line\n"
        assert progress.end() == 0.0

    def test_terminal_line_is_rewritten(self) -> None:
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]
        progress = Progress(stream)
        progress.begin("Loading")
        time.sleep(0.11)
        progress.update()
        progress.say("a line")
        progress.end()
        assert re.fullmatch(
            r"Loading \.\.\.\rLoading \.\.\. 0\.\d s\r\x1b\[Ka line\n\r\x1b\[K", stream.getvalue()
        )
