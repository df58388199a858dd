"""What every protocol offers to the client."""

# ruff: noqa: ASYNC109 (a time limit is part of this interface, over every protocol)

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from charonia_client.metadata import Query
from charonia_client.requests import GenerateRequest
from charonia_client.responses import ModelResponse

T = TypeVar("T")


class Transport(Protocol):
    """A connection to one server, used from one event loop by any number of tasks.

    Its methods raise `CharoniaClientError` alone. Time limits and retries are the caller's: cancelling the
    task that waits for a response cancels the request.
    """

    def responses(self, request: GenerateRequest) -> AsyncGenerator[ModelResponse, None]:
        """Send the request and yield its responses. Closing the generator early cancels the request."""

    async def ask(self, query: Query[T], timeout: float | None) -> T:
        """Answer a question about the server or a model within `timeout` seconds."""

    async def aclose(self) -> None:
        """Cancel what is in flight and free the connections."""
