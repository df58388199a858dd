"""Client of Charonia: generate, stream and chat with models in a Triton server, over gRPC or HTTP.

>>> from charonia_client import CharoniaClient
>>> with CharoniaClient("localhost:8001") as client:
...     for chunk in client.stream("The trumpet of Triton", max_tokens=32):
...         print(chunk.text, end="", flush=True)
"""

from charonia_client.aio import AsyncCharoniaClient, AsyncResponseStream
from charonia_client.client import CharoniaClient, ResponseStream
from charonia_client.errors import (
    CharoniaClientError,
    InternalServerError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
    RequestTimeoutError,
    ServerUnavailableError,
    UnsupportedError,
)
from charonia_client.metadata import ModelMetadata, ServerHealth, ServerMetadata, TensorMetadata
from charonia_client.results import GenerateResult, Logprob, SequenceOutput, StreamChunk, Timings, Usage

__all__ = [
    "AsyncCharoniaClient",
    "AsyncResponseStream",
    "CharoniaClient",
    "CharoniaClientError",
    "GenerateResult",
    "InternalServerError",
    "InvalidRequestError",
    "Logprob",
    "ModelMetadata",
    "ModelNotReadyError",
    "NotFoundError",
    "QueueFullError",
    "RequestCancelledError",
    "RequestFailedError",
    "RequestTimeoutError",
    "ResponseStream",
    "SequenceOutput",
    "ServerHealth",
    "ServerMetadata",
    "ServerUnavailableError",
    "StreamChunk",
    "TensorMetadata",
    "Timings",
    "UnsupportedError",
    "Usage",
]
