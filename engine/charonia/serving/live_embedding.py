"""A request for an embedding on its way through a frontend: the counterpart of `LiveRequest`."""

import time
from array import array

from charonia.errors import CharoniaError
from charonia.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestTimings
from charonia.request import TokenDelta
from charonia.serving.live_request import delta_error
from charonia.serving.metrics import TokenMeter
from charonia.serving.request import EmbeddingRequest


class LiveEmbedding:
    """Waits for the one delta that ends it, with the embedding or an error. Not thread-safe.

    Call `push` for each delta, then `take` for the output; `finished` and `error` tell how it stands.
    """

    def __init__(
        self, request: EmbeddingRequest, token_ids: list[int], *, meter: TokenMeter | None = None
    ) -> None:
        self.request = request
        self.first_id = 0
        """The engine's id. Set when the request is sent."""
        self.error: CharoniaError | None = None
        self.finished = False
        """Whether the embedding has come, or an error has."""
        self._token_ids = token_ids
        self._meter = meter
        self._arrival = time.monotonic() if request.arrival is None else request.arrival
        self._output: EmbeddingRequestOutput | None = None

    @property
    def engine_ids(self) -> range:
        """Id of the engine request behind this one."""
        return range(self.first_id, self.first_id + 1)

    def plain_token_ids(self, engine_id: int) -> list[int] | None:
        """None: there are no tokens on their way."""
        return None

    def push(self, delta: TokenDelta) -> None:
        """Take a delta; ignored once the request has ended."""
        if self.finished:
            return
        if delta.error is not None:
            self.finished, self.error = True, delta_error(delta)
        elif delta.embedding is not None:
            self.finished = True
            self._output = self._finish(delta, delta.embedding)

    def take(self) -> EmbeddingRequestOutput | None:
        """The output, once."""
        output, self._output = self._output, None
        return output

    def take_aborts(self) -> list[int]:
        """Nothing has to be ended early."""
        return []

    def _finish(self, delta: TokenDelta, embedding: bytes) -> EmbeddingRequestOutput:
        values = array("f", embedding)
        total = time.monotonic() - self._arrival
        queue = 0.0 if delta.scheduled_time is None else max(0.0, delta.scheduled_time - self._arrival)
        if self._meter is not None:
            self._meter.note_prompt(len(self._token_ids))
        return EmbeddingRequestOutput(
            request_id=self.request.request_id,
            outputs=EmbeddingOutput(values.tolist()),
            prompt_token_ids=self._token_ids,
            num_cached_tokens=delta.num_cached_tokens or 0,
            timings=RequestTimings(queue=queue, first_token=total, total=total),
        )
