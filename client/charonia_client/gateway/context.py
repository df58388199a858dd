"""Who a request is: its id and its place in a trace."""

import re
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import HTTPConnection

_SCOPE_KEY = "charonia.context"
_USABLE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_MAX_TRACESTATE_CHARS = 512


@dataclass(frozen=True, slots=True)
class RequestContext:
    """request_id: the client's X-Request-Id where it is usable, else a new one. trace: W3C trace headers."""

    request_id: str
    trace: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_scope(cls, scope: Mapping[str, Any]) -> "RequestContext":
        """Read the headers of an ASGI request."""
        headers = {name: value for name, value in scope["headers"] if name in _HEADERS}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        trace: dict[str, str] = {}
        parent = headers.get(b"traceparent", b"").decode("latin-1")
        if len(parent) <= _MAX_TRACESTATE_CHARS and _TRACEPARENT.fullmatch(parent):
            trace["traceparent"] = parent
            state = headers.get(b"tracestate", b"").decode("latin-1")
            if state and len(state) <= _MAX_TRACESTATE_CHARS and state.isascii() and state.isprintable():
                trace["tracestate"] = state
        return cls(request_id, trace)


_HEADERS = (b"x-request-id", b"traceparent", b"tracestate")


def attach_context(scope: MutableMapping[str, Any]) -> RequestContext:
    """Make the context of a request and keep it in its scope."""
    context = RequestContext.from_scope(scope)
    scope[_SCOPE_KEY] = context
    return context


def context_of(connection: HTTPConnection) -> RequestContext:
    """The context that `attach_context` made."""
    return context_in(connection.scope)


def context_in(scope: Mapping[str, Any]) -> RequestContext:
    """As `context_of`, from the request's scope."""
    context: RequestContext = scope[_SCOPE_KEY]
    return context


def replace_trace(scope: MutableMapping[str, Any], trace: Mapping[str, str]) -> None:
    """Have what the request calls for belong to another span than the client's."""
    scope[_SCOPE_KEY] = replace(context_in(scope), trace=trace)
