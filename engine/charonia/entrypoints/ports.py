"""Are the addresses that a server wants free, who holds them otherwise, and does a server answer there."""

import contextlib
import errno
import http.client
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.processes import command_line

_LISTEN = "0A"  # state of a listening socket in /proc/net/tcp


@dataclass(frozen=True)
class PortUse:
    """One port that a server is to listen on, and the flag by which the user chooses it."""

    name: str
    port: int
    flag: str


def check_ports(host: str, ports: list[PortUse]) -> None:
    """Raise `LaunchError` that names the port, its holder and the flag, unless all can be listened on."""
    seen: dict[int, PortUse] = {}
    for use in ports:
        if not 0 < use.port < 65536:
            raise LaunchError(f"{use.flag} must be between 1 and 65535, got {use.port}")
        if use.port in seen:
            raise LaunchError(
                f"{seen[use.port].flag} and {use.flag} both ask for port {use.port}; change one"
            )
        seen[use.port] = use
        _check_port(host, use)


def _check_port(host: str, use: PortUse) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, use.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise LaunchError(f"--host {host}: {error.strerror}", "Give an address of this machine.") from None
    with socket.socket(family, kind, protocol) as listener:
        # Connections that linger in TIME_WAIT then do not matter; a listening socket still does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except PermissionError:
            raise LaunchError(
                f"this user may not listen on the {use.name} port {use.port}",
                f"Choose one of 1024 or above with {use.flag}.",
            ) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LaunchError(f"--host {host}: cannot listen there: {error.strerror}") from None
            raise LaunchError(
                f"{use.name} port {use.port} on {host} is taken{_holder(use.port)}",
                f"Stop that process, or choose another port with {use.flag} PORT.",
            ) from None


def _holder(port: int) -> str:
    """` by process PID (command)`, or nothing where that cannot be seen (another user's process)."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and not wanted.isdisjoint(_descriptors(entry / "fd")):
            return f" by process {entry.name} ({' '.join(command_line(int(entry.name))[:3])[:80]})"
    return ""


def _descriptors(folder: Path) -> Iterator[str]:
    """What the open descriptors of a process are; as many as can be seen, while they come and go."""
    with contextlib.suppress(OSError):
        for item in folder.iterdir():
            with contextlib.suppress(OSError):
                yield str(item.readlink())


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def connect_host(host: str) -> str:
    """Where to connect to a server that listens on `host`: a wildcard is reached through loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def connect_address(host: str, port: int) -> str:
    """`host:port` for clients of a server that listens on `host`; an IPv6 address stands in brackets."""
    name = connect_host(host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def http_status(host: str, port: int, path: str, *, timeout_s: float) -> int | None:
    """Status code of `GET path`, or None where nothing answers within the timeout."""
    connection = http.client.HTTPConnection(connect_host(host), port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
