"""A gateway that listens on a port of its own, on a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from charonia_client.gateway.app import create_app
from charonia_client.gateway.server import ListenSettings, server_config
from charonia_client.gateway.settings import GatewaySettings


@contextmanager
def running_gateway(settings: GatewaySettings) -> Iterator[str]:
    """Its address, such as http://127.0.0.1:1234."""
    server = uvicorn.Server(server_config(create_app(settings), ListenSettings(drain_s=2)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
