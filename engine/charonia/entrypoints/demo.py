"""`charonia demo`: streams a chat answer to the terminal, from the running server or from one of its own."""

import argparse
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from charonia_client import CharoniaClient, CharoniaClientError, GenerateResult, StreamChunk

from charonia.entrypoints.deployment import Deployment, ServeSettings
from charonia.entrypoints.fetch_model import prepare_default_model
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.ports import http_status
from charonia.entrypoints.progress import Progress
from charonia.entrypoints.serve import add_server_flags, positive_int
from charonia.entrypoints.triton_server import TritonServer

QUESTION = "What is a trumpet shell, and who blew one in Greek mythology?"

TEMPERATURE, TOP_P = 0.2, 0.9
"""What the default model is made for: at a temperature of 1, one so small rambles."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `charonia demo`."""
    parser.add_argument("question", nargs="?", default=QUESTION, help="(default: %(default)r)")
    parser.add_argument("--model", metavar="DIR", help="model directory, where the demo must start a server")
    parser.add_argument("--model-name", default="llm", metavar="NAME", help="(default %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to look for a server (default %(default)s)"
    )
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT", help="(default %(default)s)")
    parser.add_argument(
        "--max-tokens", type=positive_int, default=256, metavar="N", help="(default %(default)s)"
    )
    add_server_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Ask the question and stream the answer; returns 0. Raises `LaunchError` where that fails."""
    progress = Progress(sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that contexts are left
    ready = f"/v2/models/{options.model_name}/ready"
    if http_status(options.host, options.http_port, ready, timeout_s=2.0) == 200:
        ask(f"http://{options.host}:{options.http_port}", options, progress)
        return 0
    progress.say(f"No ready server on port {options.http_port}; starting one for this demo.")
    with own_server(options, progress) as server:
        ask(f"http://{server.http_url}", options, progress)
    return 0


@contextmanager
def own_server(options: argparse.Namespace, progress: Progress) -> Iterator[TritonServer]:
    """A ready server on free loopback ports, for as long as the context lasts."""
    http_port, grpc_port, metrics_port = _free_ports(3)
    settings = ServeSettings(
        model=options.model or str(prepare_default_model(progress)),
        model_name=options.model_name,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        server=options.server,
        exit_timeout_s=5,
        verbose=options.verbose,
    )
    with Deployment(settings) as deployment:
        server = deployment.make_server()
        progress.begin(f"Loading {settings.model}")
        try:
            server.start()
            while not server.is_ready():
                server.check_running()
                progress.update()
                time.sleep(0.1)
            progress.end()
            yield server
            server.stop()
        finally:
            progress.end()
            server.kill()


def ask(url: str, options: argparse.Namespace, progress: Progress) -> None:
    """Stream the answer to standard output, then say how fast it came. Raises `LaunchError` on failure."""
    print(f"> {options.question}\n", flush=True)
    messages = [{"role": "user", "content": options.question}]
    chunks: list[StreamChunk] = []
    started = first = last = time.perf_counter()
    try:
        with (
            CharoniaClient(url) as client,
            client.chat(
                messages,
                stream=True,
                model=options.model_name,
                max_tokens=options.max_tokens,
                temperature=TEMPERATURE,
                top_p=TOP_P,
            ) as stream,
        ):
            for chunk in stream:
                last = time.perf_counter()
                first = first if chunks else last
                chunks.append(chunk)
                print(chunk.text, end="", flush=True)
    except CharoniaClientError as error:
        raise LaunchError(f"the server did not answer: {error}") from error
    print("\n", flush=True)
    progress.say(summary(chunks, ttft_s=first - started, decode_s=last - first))


def summary(chunks: list[StreamChunk], *, ttft_s: float, decode_s: float) -> str:
    """Tokens, time to the first of them (TTFT) and tokens per second from then on, in one line."""
    usage = GenerateResult.from_chunks(chunks).usage
    num_tokens = usage.num_output_tokens if usage is not None else len(chunks)
    rate = f"{(num_tokens - 1) / decode_s:.1f} tokens/s" if decode_s > 0 else "one response"
    return f"{num_tokens} tokens, first after {ttft_s * 1e3:.0f} ms, then {rate}"


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
