"""The connections to one server: made when they are needed, and made anew when they are lost."""

import asyncio
import socket
import ssl
from collections import deque
from contextlib import suppress

from charonia_client.endpoint import Endpoint
from charonia_client.errors import (
    CharoniaClientError,
    RequestCancelledError,
    ServerUnavailableError,
    no_server,
)
from charonia_client.http2 import Http2Connection, StreamError

_CONNECT_TIMEOUT_S = 20.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 1.0
"""Short, so that a restarted server is found again at once."""
_MAX_CONNECTIONS = 16
"""Without those that only end their streams."""
_CLOSE_TIMEOUT_S = 2.0
_TCP_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""Seconds, seconds, probes: the kernel finds out about a host that is gone in two minutes."""


class GrpcConnections:
    """One connection as a rule; more only where the server limits the streams of each. Belongs to one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._connections: list[Http2Connection] = []
        self._connecting: asyncio.Task[CharoniaClientError | None] | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._failure: CharoniaClientError | None = None
        self._backoff_s = 0.0
        self._backoff_until = 0.0
        self._closed = False

    def with_room(self) -> Http2Connection | None:
        """A connection that takes one more stream now."""
        for connection in self._connections:
            if connection.has_room:
                return connection
        return None

    async def wait_for_room(self) -> None:
        """Return when it is worth asking `with_room` again: connected, or a stream of a full server has ended.

        Raises `CharoniaClientError` if no connection can be made. Until the end of a back-off no attempt is made.
        """
        if self._closed:
            raise RequestCancelledError("the client was closed", url=self._endpoint.url)
        if sum(each.is_open for each in self._connections) >= _MAX_CONNECTIONS:
            await self._wait_for_a_stream()
            return
        if self._connecting is None:
            loop = asyncio.get_running_loop()
            if self._failure is not None and loop.time() < self._backoff_until:
                raise _copy(self._failure)
            self._connecting = loop.create_task(self._connect())
        # Whoever gives up waiting leaves the attempt to the others.
        if (failure := await asyncio.shield(self._connecting)) is not None:
            raise _copy(failure)

    async def aclose(self) -> None:
        """Close all, and wait until what has been written is sent."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        if connections:
            await asyncio.wait([each.closed for each in connections], timeout=_CLOSE_TIMEOUT_S)

    async def _connect(self) -> CharoniaClientError | None:
        """Make a connection; returns why that was impossible."""
        loop = asyncio.get_running_loop()
        try:
            self._connections.append(await self._made())
            self._failure, self._backoff_s = None, 0.0
        except asyncio.CancelledError:
            return RequestCancelledError("the client was closed", url=self._endpoint.url)
        except (OSError, StreamError, UnicodeError) as error:  # the last from names that are none
            self._failure = self._explained(error)
            self._backoff_s = min(self._backoff_s * 2 or _FIRST_BACKOFF_S, _MAX_BACKOFF_S)
            self._backoff_until = loop.time() + self._backoff_s
        finally:
            self._connecting = None
        return self._failure

    async def _made(self) -> Http2Connection:
        endpoint = self._endpoint
        tls = tls_context() if endpoint.secure else None
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            transport, connection = await loop.create_connection(
                lambda: Http2Connection(self._on_room), endpoint.host, endpoint.port, ssl=tls
            )
            try:
                _set_keepalive(transport.get_extra_info("socket"))
                if tls is not None and _negotiated(transport) != "h2":
                    raise StreamError("the server does not offer HTTP/2 over TLS")
                await connection.ready
                if not connection.has_room:  # the next attempt has to wait for the back-off
                    raise StreamError("the server is going away, or takes no requests now")
            except BaseException:
                connection.abort()
                raise
        connection.closed.add_done_callback(lambda _: self._lost(connection))
        return connection

    def _lost(self, connection: Http2Connection) -> None:
        with suppress(ValueError):
            self._connections.remove(connection)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _explained(self, error: Exception) -> CharoniaClientError:
        url = self._endpoint.url
        if isinstance(error, TimeoutError):
            text = f"no connection within {_CONNECT_TIMEOUT_S:g} s"
        elif isinstance(error, ssl.SSLError):
            text = f"no TLS connection: {error.reason or error}"
        elif isinstance(error, StreamError):
            text = str(error)
        else:
            return no_server(url)
        return ServerUnavailableError(text, url=url)

    async def _wait_for_a_stream(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
            # Whoever waited may have found room elsewhere, and the server may have made room for many at once.
            asyncio.get_running_loop().call_soon(self._wake_next)
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._on_room()  # the place that was kept for this one
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(waiter)

    def _wake_next(self) -> None:
        if self._waiting and self.with_room() is not None:
            self._on_room()

    def _on_room(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def tls_context() -> ssl.SSLContext:
    """TLS that trusts the system's authorities, and offers HTTP/2."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    return context


def _negotiated(transport: asyncio.Transport) -> str | None:
    tls = transport.get_extra_info("ssl_object")
    return None if tls is None else tls.selected_alpn_protocol()


def _set_keepalive(connected: socket.socket | None) -> None:
    if connected is None:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_KEEPALIVE:
        if (option := getattr(socket, name, None)) is not None:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _copy(error: CharoniaClientError) -> CharoniaClientError:
    """An exception of its own for each that is told: a raised one carries its raiser's traceback."""
    return type(error)(error.message, url=error.url, model=error.model)
