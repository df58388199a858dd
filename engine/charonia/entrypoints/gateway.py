"""The OpenAI gateway beside a served model: a child process, restarted when it dies, stopped after the server."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from charonia.entrypoints.engine_flags import engine_settings
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.ports import connect_address, http_status
from charonia.entrypoints.processes import one_for_four_cores
from charonia.entrypoints.server_log import ServerLog
from charonia.entrypoints.spawn import spawn_tied
from charonia.entrypoints.supervisor import RestartBudget, RestartPolicy
from charonia.entrypoints.triton_server import describe_exit

DEFAULT_PORT = 9000
_NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client", "tritonclient")
_WRONG_USAGE = 2
_START_S = 20.0
_DRAIN_S = 2
"""What answers may still take once the server, which has drained, is gone."""
_PROBE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """How to run the gateway. flags: those of ``charonia-client gateway`` that the user chose. keys: API keys."""

    port: int
    host: str
    flags: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{connect_address(self.host, self.port)}"


def add_gateway_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `charonia serve` that are about the gateway."""
    group = parser.add_argument_group("OpenAI gateway")
    group.add_argument(
        "--gateway-port",
        type=int,
        metavar="PORT",
        help=f"serve the OpenAI API there, 0 for not at all (default {DEFAULT_PORT}, where its packages are installed)",
    )
    group.add_argument(
        "--gateway-workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="processes of the gateway; the default is one for every four cores, here %(default)s",
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require this key on every route but /health; it guards the gateway, not Triton's own ports",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="the same, one key a line; # at its start or after a space begins a comment",
    )
    group.add_argument(
        "--tool-parser",
        "--tool-call-parser",
        metavar="NAME",
        help="format of tool calls (default: by the chat template)",
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="format of reasoning (default: by the chat template)"
    )
    group.add_argument(
        "--generation-config",
        choices=["auto", "vllm"],
        help="what a request leaves open is sampled as the checkpoint's generation_config.json recommends (auto, the "
        "default), or with temperature 1 and no filters (vllm)",
    )
    group.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web origin that may call the API",
    )


def default_workers() -> int:
    """One for every four cores: four of them pass on all that an 8B model on one GPU says."""
    return one_for_four_cores()


def gateway_settings(options: argparse.Namespace, report: Callable[[str], None]) -> GatewaySettings | None:
    """What the command line asks for; None where there is to be no gateway. Raises `LaunchError`."""
    port: int | None = options.gateway_port
    if port == 0:
        return None
    missing = next((name for name in _NEEDED if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        text = f"the OpenAI gateway needs the package {missing}: pip install 'charonia[gateway]'"
        if port is not None:
            raise LaunchError(text)
        report(f"No OpenAI API: {text}")
        return None
    # They travel in a file, one a line, where # begins a comment.
    if any(key.startswith("#") or key.split() != [key] for key in options.api_key):
        raise LaunchError("an API key must not be empty, begin with # or have white space in it")
    flags = [f"--workers={options.gateway_workers}"]
    if options.generation_config is not None:
        flags.append(f"--generation-config={options.generation_config}")
    engine = engine_settings(options)
    flags += [
        f"--{name.replace('_', '-')}={engine[name]}"
        for name in ("served_model_name", "otlp_traces_endpoint")
        if name in engine
    ]
    flags += [f"--allowed-origin={origin}" for origin in options.allowed_origin]
    for kind in ("tool", "reasoning"):
        if (parser := getattr(options, f"{kind}_parser")) is not None:
            flags.append(f"--{kind}-parser={parser}")
    if options.api_key_file is not None:
        flags.append(f"--api-key-file={options.api_key_file.absolute()}")
    return GatewaySettings(
        port=DEFAULT_PORT if port is None else port,
        host=options.host,
        flags=tuple(flags),
        keys=tuple(options.api_key),
    )


class GatewayProcess:
    """The running gateway. Not thread-safe: the supervisor's thread drives it.

    It starts before the model is ready and outlives restarts of the server, answering 503 meanwhile.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        triton: str,
        model: str,
        folder: Path,
        log_path: Path,
        report: Callable[[str], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """triton: the server's gRPC address. folder: private; takes the file of API keys, if there are any."""
        self.settings = settings
        self._triton = triton
        self._model = model
        self._folder = folder
        self._log_path = log_path
        self._report = report
        self._budget = RestartBudget(policy or RestartPolicy())
        self._process: subprocess.Popen[bytes] | None = None
        self._log = ServerLog(log_path)
        self._restart_at: float | None = None
        self._has_listened = False

    @property
    def pid(self) -> int | None:
        """Pid of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it, without waiting. Raises `LaunchError`."""
        self._restart_at = None
        self._log = ServerLog(self._log_path)
        self._process = spawn_tied(self._command(), os.environ, self._log_path)

    def wait_listening(self) -> None:
        """Return once it answers. Raises `LaunchError` if it does not come to."""
        deadline = time.monotonic() + _START_S
        while http_status(self.settings.host, self.settings.port, "/health", timeout_s=_PROBE_S) is None:
            self.poll(time.monotonic())
            if time.monotonic() > deadline:
                raise LaunchError("the OpenAI gateway does not answer", detail=self._log.tail())
            time.sleep(0.05)
        self._has_listened = True

    def poll(self, now: float) -> None:
        """Look after it; `now` is CLOCK_MONOTONIC. Raises `LaunchError` where its first start refuses its settings."""
        if self._restart_at is not None:
            if now >= self._restart_at:
                self.start()
            return
        status = None if self._process is None else self._process.poll()
        if status is None:
            return
        self._process = None
        if status == _WRONG_USAGE and not self._has_listened:
            cause = self._log.tail(1).removeprefix("charonia-client: ")
            raise LaunchError(f"the OpenAI gateway refuses its settings: {cause}")
        delay = self._budget.spend(now)
        if delay is None:
            self._report(f"the OpenAI gateway {describe_exit(status)} once too often; it stays away")
            return
        self._report(f"the OpenAI gateway {describe_exit(status)}; restarting it in {delay:g} s")
        self._restart_at = now + delay

    def stop(self) -> None:
        """Let it finish its answers, a moment at most, and end it. Safe to call again."""
        process, self._process, self._restart_at = self._process, None, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_DRAIN_S + 1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _command(self) -> Sequence[str]:
        settings = self.settings
        command = [
            sys.executable, "-m", "charonia_client", "gateway", f"--triton={self._triton}", f"--model={self._model}",
            f"--host={settings.host}", f"--port={settings.port}", f"--drain-timeout={_DRAIN_S}", *settings.flags,
        ]  # fmt: skip
        if settings.keys:
            # Arguments of a process are for all users to see.
            path = self._folder / "api_keys"
            path.touch(mode=0o600)
            path.write_text("".join(f"{key}\n" for key in settings.keys))
            command.append(f"--api-key-file={path}")
        return command
