"""Where a server is and how to speak to it."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Protocol = Literal["grpc", "http"]

_DEFAULT_PORT: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address. authority: ``host:port``, IPv6 hosts in brackets. secure: use TLS."""

    protocol: Protocol
    authority: str
    secure: bool = False

    @classmethod
    def parse(cls, url: str | None = None, protocol: Protocol | None = None) -> "Endpoint":
        """Read ``[grpc|grpcs|http|https://]host[:port]``; without a scheme, `protocol` decides, and gRPC is
        the default.

        A missing host is localhost; a missing port is Triton's: 8001 for gRPC, 8000 for HTTP.
        Raises ValueError for anything else.
        """
        if protocol not in (None, "grpc", "http"):
            raise ValueError(f"protocol must be 'grpc' or 'http', got {protocol!r}")
        text = url or "localhost"
        scheme, separator, rest = text.partition("://")
        secure = False
        if separator:
            if scheme not in _SCHEMES:
                raise ValueError(
                    f"the URL {text!r} must start with one of grpc://, grpcs://, http:// and https://"
                )
            stated, secure = _SCHEMES[scheme]
            if protocol not in (None, stated):
                raise ValueError(f"the URL {text!r} contradicts protocol={protocol!r}")
            protocol = stated
        else:
            rest = text
        protocol = protocol or "grpc"
        return cls(protocol, _authority(rest, text, _DEFAULT_PORT[protocol]), secure)

    @property
    def url(self) -> str:
        """The address in the form in which users state it."""
        if self.protocol == "http":
            return f"{'https' if self.secure else 'http'}://{self.authority}"
        return f"grpcs://{self.authority}" if self.secure else self.authority

    @property
    def host(self) -> str:
        """The host alone, without brackets."""
        return self.authority.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.authority.rpartition(":")[2])


def _authority(rest: str, text: str, default_port: int) -> str:
    parts = urlsplit(f"//{rest.rstrip('/')}")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"the URL {text!r} has no valid port: {error}") from None
    if parts.path or parts.query or parts.fragment or parts.username or not parts.hostname:
        raise ValueError(f"the URL {text!r} must be a host and a port only")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port or default_port}"
