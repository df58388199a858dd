"""The gateway beside a served model, as a process that `charonia serve` looks after."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from charonia.entrypoints import gateway
from charonia.entrypoints.engine_flags import add_engine_flags
from charonia.entrypoints.gateway import GatewayProcess, GatewaySettings, add_gateway_flags, gateway_settings
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.supervisor import RestartPolicy
from support.launch import eventually, is_running


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    add_gateway_flags(parser)
    add_engine_flags(parser)
    return parser.parse_args(arguments)


class TestSettings:
    def test_defaults(self) -> None:
        assert gateway_settings(parse("--gateway-workers=3"), print) == GatewaySettings(
            port=9000, host="127.0.0.1", flags=("--workers=3",)
        )

    def test_flags(self) -> None:
        settings = gateway_settings(
            parse("--gateway-port=1", "--gateway-workers=1", "--served-model-name=m", "--tool-parser=none",
                  "--api-key=k", "--allowed-origin=o", "--api-key-file=/f", "--generation-config=vllm"), print
        )  # fmt: skip
        assert settings is not None
        assert set(settings.flags) == {
            "--workers=1", "--served-model-name=m", "--tool-parser=none", "--allowed-origin=o", "--api-key-file=/f",
            "--generation-config=vllm",
        }  # fmt: skip
        assert settings.keys == ("k",)
        assert settings.url == "http://127.0.0.1:1"

    @pytest.mark.parametrize("key", ["", " ", "two words", "pass\n", "#x"])
    def test_keys_that_a_file_cannot_hold(self, key: str) -> None:
        with pytest.raises(LaunchError, match="API key must not"):
            gateway_settings(parse("--api-key=right", f"--api-key={key}"), print)

    def test_off(self) -> None:
        assert gateway_settings(parse("--gateway-port=0"), print) is None

    def test_without_its_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gateway, "_NEEDED", ("no_such_package",))
        lines: list[str] = []
        assert gateway_settings(parse(), lines.append) is None
        assert "no_such_package" in lines[0]
        with pytest.raises(LaunchError, match="no_such_package"):
            gateway_settings(parse("--gateway-port=9000"), print)


class Scripted(GatewayProcess):
    """Runs a line of Python instead of the gateway."""

    script = "import time; time.sleep(60)"

    def _command(self) -> list[str]:
        super()._command()
        return [sys.executable, "-c", self.script]


@pytest.fixture
def make(tmp_path: Path):
    made: list[Scripted] = []

    def make(script: str, limit: int = 1) -> tuple[Scripted, list[str]]:
        lines: list[str] = []
        process = Scripted(
            GatewaySettings(port=1, host="127.0.0.1", keys=("secret",)), triton="t", model="llm", folder=tmp_path,
            log_path=tmp_path / "log", report=lines.append, policy=RestartPolicy(limit=limit, first_delay_s=0.1),
        )  # fmt: skip
        process.script = script
        made.append(process)
        return process, lines

    yield make
    for process in made:
        process.stop()


def polled_until(process: Scripted, condition) -> bool:
    def check() -> bool:
        process.poll(time.monotonic())
        return bool(condition())

    return eventually(check, 10)


class TestProcess:
    def test_it_is_restarted_within_its_budget(self, make) -> None:
        process, lines = make("import time; time.sleep(60)")
        process.start()
        first = process.pid
        os.kill(first, signal.SIGKILL)
        assert polled_until(process, lambda: process.pid not in (None, first))
        assert lines == ["the OpenAI gateway was ended by SIGKILL; restarting it in 0.1 s"]
        os.kill(process.pid, signal.SIGKILL)
        assert polled_until(process, lambda: len(lines) == 2)
        assert "it stays away" in lines[1]
        assert process.pid is None

    def test_wrong_settings_end_the_start(self, make) -> None:
        process, _ = make("import sys; print('charonia-client: no such thing'); sys.exit(2)")
        process.start()
        with pytest.raises(LaunchError, match="refuses its settings: no such thing"):
            process.wait_listening()

    def test_stop(self, make) -> None:
        process, lines = make("import time; time.sleep(60)")
        process.start()
        pid = process.pid
        process.stop()
        assert not is_running(pid)
        process.poll(time.monotonic())
        assert lines == []

    def test_keys_are_in_a_private_file(self, make, tmp_path: Path) -> None:
        process, _ = make("pass")
        process.start()
        assert (tmp_path / "api_keys").read_text() == "secret\n"
        assert (tmp_path / "api_keys").stat().st_mode & 0o777 == 0o600
        assert not any("secret" in part for part in GatewayProcess._command(process))
