"""As much of HTTP/2 as a client of gRPC streams needs, with as little work for each frame as possible.

Header compression is `hpack`'s. The Python libraries of gRPC take several times as long for a message, and a gateway
should be able to pass on all that a server says (`benchmarks/RESULTS.md`).
"""

from charonia_client.http2.connection import Http2Connection
from charonia_client.http2.frames import ErrorCode
from charonia_client.http2.streams import StreamError, StreamSink

__all__ = ["ErrorCode", "Http2Connection", "StreamError", "StreamSink"]
