"""The gateway as a process, or several that share one port: uvicorn over the application."""

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead

from charonia_client.gateway.app import create_app
from charonia_client.gateway.http_protocol import BoundedHttpProtocol
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.workers import WorkerGroup

_BACKLOG = 2048
_KEEP_ALIVE_S = 30
"""How long idle connections stay open: longer than clients keep theirs, or they would send into closing ones."""
_METRICS_DIR_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""How prometheus_client, when it is imported in a worker, learns that it is one of several."""


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where to listen, and with how many processes. drain_s: how long answers in flight may go on after a stop."""

    host: str = "127.0.0.1"
    port: int = 9000
    workers: int = 1
    access_log: bool = False
    drain_s: int = 30

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be."""
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"there is no port {self.port}")
        if self.workers < 1:
            raise ValueError(f"there must be at least 1 worker, got {self.workers}")
        if self.drain_s < 0:
            raise ValueError(f"drain_s must not be negative, got {self.drain_s}")


def run_gateway(
    settings: GatewaySettings, listen: ListenSettings, on_ready: Callable[[str], None] = lambda url: None
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    on_ready: called with the address once it is taken. Raises ValueError for wrong settings and OSError for an
    address that cannot be listened on.
    """
    app = create_app(settings)
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    # Made here, so that the address is known to be free before anything else starts.
    with socket.create_server((listen.host, listen.port), family=family, backlog=_BACKLOG) as listener:
        host, port = listener.getsockname()[:2]
        on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        if listen.workers == 1:
            return _serve(app, listen, listener)
        with tempfile.TemporaryDirectory(prefix="charonia-gateway-") as metrics_dir:
            os.environ[_METRICS_DIR_VARIABLE] = metrics_dir
            work = partial(_work, settings, listen, metrics_dir)
            # Or the requests that a dead worker was answering would be in flight for ever.
            forget = partial(mark_process_dead, path=metrics_dir)
            return WorkerGroup(work, listener, listen.workers, listen.drain_s, forget).run()


def _work(
    settings: GatewaySettings, listen: ListenSettings, metrics_dir: str, listener: socket.socket
) -> None:
    _serve(create_app(settings, metrics_dir), listen, listener)


def server_config(app: FastAPI, listen: ListenSettings) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        log_level=logging.INFO if listen.access_log else logging.WARNING,
        access_log=listen.access_log,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=listen.drain_s,
        lifespan="on",
    )


def _serve(app: FastAPI, listen: ListenSettings, listener: socket.socket) -> int:
    server = uvicorn.Server(server_config(app, listen))

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn raises the signals that ended it once more, for these handlers: a stop that was asked for is no failure.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if server.started else 1
