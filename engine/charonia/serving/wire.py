"""Messages between frontends and the engine: msgpack over a unix socket (`channel.py`). Nothing is ever unpickled."""

import msgspec

from charonia.core.stats import EngineStats
from charonia.request import EngineRequest, TokenDelta

__all__ = ["Abort", "Bye", "EngineStats", "Hello", "OutputFrame", "Submit", "ToEngine", "Welcome"]

CLIENT_SHIFT = 40
"""A request id is `client_index << CLIENT_SHIFT | counter`: unique in the engine without any coordination."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A frontend's first message."""

    pid: int


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Requests to queue."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Requests to end, in whatever state they are; unknown ids are ignored."""

    request_ids: list[int]


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The frontend leaves; the engine ends with its last frontend."""


ToEngine = Hello | Submit | Abort | Bye


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The engine's answer to `Hello`."""

    client_index: int


class OutputFrame(msgspec.Struct, frozen=True, tag="output", omit_defaults=True):
    """What one step brought for one frontend; `stats` now and then."""

    deltas: list[TokenDelta]
    stats: EngineStats | None = None


ToFrontend = Welcome | OutputFrame

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_frontend = msgspec.msgpack.Decoder(ToFrontend).decode
