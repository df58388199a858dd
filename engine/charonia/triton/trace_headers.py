"""W3C trace context of a request: from the server's own span, or as the request parameters that gateways send."""

from collections.abc import Mapping
from typing import Any

import msgspec

from charonia.triton.pb import PbRequest

TRACE_HEADERS = frozenset({"traceparent", "tracestate"})
_MAX_CHARS = 1024


def server_trace(request: PbRequest) -> Mapping[str, str]:
    """The context of the span in which the server handles the request; empty where it does not trace it."""
    context = request.trace().get_context()
    values = msgspec.json.decode(context) if context else {}
    return take_trace_headers(values) if isinstance(values, dict) else {}


def take_trace_headers(settings: dict[str, Any]) -> Mapping[str, str]:
    """Take trace context out of `settings`. What is malformed is dropped: tracing fails no request."""
    names = [name for name in settings if name.lower() in TRACE_HEADERS]
    headers = {name.lower(): settings.pop(name) for name in names}
    return {
        name: value for name, value in headers.items() if isinstance(value, str) and len(value) <= _MAX_CHARS
    }
