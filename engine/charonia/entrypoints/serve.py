"""`charonia serve`: a model in a supervised Triton server, until Ctrl-C."""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from charonia.entrypoints.deployment import Deployment, ServeSettings
from charonia.entrypoints.engine_flags import add_engine_flags, engine_settings
from charonia.entrypoints.fetch_model import prepare_default_model
from charonia.entrypoints.gateway import GatewayProcess, GatewaySettings, add_gateway_flags, gateway_settings
from charonia.entrypoints.ports import PortUse, check_ports, connect_address
from charonia.entrypoints.processes import one_for_four_cores
from charonia.entrypoints.progress import Progress
from charonia.entrypoints.supervisor import StopRequest, Supervised, Supervisor
from charonia.entrypoints.triton_server import TritonServer
from charonia.errors import CharoniaError
from charonia.model_config import ModelConfig

_TEXT = "The trumpet shell is"
_GENERATE = {"text_input": _TEXT, "stream": True, "max_tokens": 64}
_EMBED = {"text_input": "", "embedding_request": json.dumps({"input": _TEXT})}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia serve`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="local Hugging Face model directory (default: the embedded model)",
    )
    add_server_flags(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    group.add_argument("--http-port", type=int, default=8000, metavar="PORT", help="(default %(default)s)")
    group.add_argument("--grpc-port", type=int, default=8001, metavar="PORT", help="(default %(default)s)")
    group.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="(default %(default)s)")
    group.add_argument("--model-name", default="llm", metavar="NAME", help="(default %(default)s)")
    group.add_argument(
        "--instances",
        type=positive_int,
        default=default_instances(),
        metavar="N",
        help="frontend processes that share the one engine (default: one for every four cores, at most 8)",
    )
    group.add_argument(
        "--parameter",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter of the model's config.pbtxt, such as REPORT_CUSTOM_METRICS=true; may be given again",
    )
    group.add_argument("--log-file", type=Path, metavar="FILE", help="append the server's log to FILE")
    group.add_argument(
        "--exit-timeout",
        type=positive_int,
        default=30,
        metavar="SECONDS",
        help="time that requests in flight get to finish on Ctrl-C (default %(default)s)",
    )
    group.add_argument(
        "--start-timeout",
        type=positive_int,
        default=600,
        metavar="SECONDS",
        help="time that the model may take to load (default %(default)s)",
    )
    add_gateway_flags(parser)
    add_engine_flags(parser)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that every command that may start a server has."""
    parser.add_argument(
        "--server", metavar="PATH", help="tritonserver binary, or the folder it is installed in"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the server's log and full tracebacks"
    )


def positive_int(text: str) -> int:
    """Argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _parameter(text: str) -> tuple[str, str]:
    """Argparse type: NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    if name == "runtime_dir":
        raise argparse.ArgumentTypeError("runtime_dir is chosen by charonia serve")
    return name, value


def default_instances() -> int:
    """One for every four cores: a frontend keeps about one busy, the server and the clients need the others."""
    return one_for_four_cores()


def run(options: argparse.Namespace) -> int:
    """Serve until a signal asks to stop; returns 0 then. Raises `LaunchError` where serving failed."""
    progress = Progress(sys.stderr)
    stop = StopRequest()
    settings = _serve_settings(options, progress)
    wanted_gateway = gateway_settings(options, progress.say)
    with stop_on_signals(stop), Deployment(settings) as deployment:
        supervised = Supervised(
            deployment.make_server, settings.model_name, settings.instances, deployment.runtime_dir
        )

        def report(line: str) -> None:
            progress.say(f"{time.strftime('%H:%M:%S')} {line}")

        supervisor = Supervisor(supervised, stop, report, ready_timeout_s=options.start_timeout)
        gateway = _gateway(wanted_gateway, settings, deployment, report)

        def on_ready(server: TritonServer) -> None:
            if gateway is not None:
                gateway.wait_listening()
            took_s = progress.end()
            print(ready_message(settings, server, took_s, gateway), flush=True)

        def on_poll(server: TritonServer) -> None:
            progress.update()
            if gateway is not None:
                gateway.poll(time.monotonic())
            if settings.verbose and (text := server.log.new_text()):
                progress.say(text.rstrip("\n"))

        progress.begin(f"Loading {settings.model}")
        try:
            if gateway is not None:
                gateway.start()
            supervisor.run(on_ready, on_poll)
        finally:
            progress.end()
            if gateway is not None:
                gateway.stop()
    progress.say("Stopped.")
    return 0


def _serve_settings(options: argparse.Namespace, progress: Progress) -> ServeSettings:
    return ServeSettings(
        model=options.model or str(prepare_default_model(progress)),
        engine=engine_settings(options),
        parameters=dict(options.parameter),
        model_name=options.model_name,
        instances=options.instances,
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        server=options.server,
        log_file=options.log_file,
        exit_timeout_s=options.exit_timeout,
        verbose=options.verbose,
    )


def _gateway(
    wanted: GatewaySettings | None,
    settings: ServeSettings,
    deployment: Deployment,
    report: Callable[[str], None],
) -> GatewayProcess | None:
    """The gateway, not started yet. Raises `LaunchError` for a port that it cannot have."""
    if wanted is None:
        return None
    check_ports(settings.host, [*settings.ports, PortUse("gateway", wanted.port, "--gateway-port")])
    return GatewayProcess(
        wanted,
        triton=connect_address(settings.host, settings.grpc_port),
        model=settings.model_name,
        folder=deployment.folder,
        log_path=deployment.log_path,
        report=report,
    )


def _generates(model: str) -> bool:
    """Whether a model writes text. One that only the server understands is taken to."""
    try:
        return ModelConfig.from_dir(model).generates
    except CharoniaError:
        return True


def ready_message(
    settings: ServeSettings, server: TritonServer, took_s: float, gateway: GatewayProcess | None = None
) -> str:
    """What a user needs to know once the server is ready, with a command to try."""
    address = f"http://{server.http_url}"
    route, example = ("generate_stream", _GENERATE) if _generates(settings.model) else ("generate", _EMBED)
    url = f"{address}/v2/models/{settings.model_name}/{route}"
    return "\n".join(
        [
            f"Ready after {took_s:.1f} s: {Path(settings.model).name} as model {settings.model_name!r}",
            f"  HTTP {address}   gRPC {server.grpc_url}   metrics http://{server.metrics_url}/metrics",
            *(
                []
                if gateway is None
                else [f"  OpenAI API {gateway.settings.url}/v1   chat {gateway.settings.url}/"]
            ),
            "Try it:",
            f"  curl -N {url} -d {shlex.quote(json.dumps(example))}",
            "Ctrl-C stops it.",
        ]
    )


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Within the context, SIGINT, SIGTERM and SIGHUP ask to stop; a second one ends everything at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop.ask()

    # Whoever started us with a signal ignored (nohup) wants it ignored.
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
