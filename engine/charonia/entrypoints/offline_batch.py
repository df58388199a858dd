"""A batch of requests on an engine in this process."""

from collections.abc import Iterable

from charonia.core.engine_core import EngineCore
from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.request import EngineRequest, TokenDelta
from charonia.serving.live_embedding import LiveEmbedding
from charonia.serving.live_request import LiveRequest

Live = LiveRequest | LiveEmbedding
Output = RequestOutput | EmbeddingRequestOutput


class OfflineBatch:
    """Requests that are run together, to the end: `push` what the engine's steps bring until `num_open` is 0.

    Tokens with which nothing happens on their way (no text, no logprobs) are appended where they belong, and that is
    all that a step does for them.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._by_id: dict[int, Live] = {}
        self._plain: dict[int, list[int]] = {}
        """Output token ids by engine id, of sequences whose first token has come and that need nothing else."""
        self._results: dict[int, Output] = {}
        self.num_open = 0
        """Requests that have not finished."""

    def add(self, live: Live, requests: Iterable[EngineRequest]) -> None:
        """Queue a request, which shows its output only in the end, as the engine requests behind it."""
        self.num_open += 1
        for request in requests:
            self._by_id[request.request_id] = live
            self._core.add(request)

    def push(self, deltas: Iterable[TokenDelta]) -> int:
        """Take what a step brought; how many requests finished. Raises what ended a request with an error."""
        before = self.num_open
        plain = self._plain
        for delta in deltas:
            if delta.finish_reason is None:
                token_ids = plain.get(delta.request_id)
                if token_ids is not None:
                    token_ids += delta.token_ids
                    continue
            self._push(delta)
        return before - self.num_open

    def results(self, lives: Iterable[Live]) -> list[Output]:
        """The outputs of finished requests."""
        return [self._results[live.first_id] for live in lives]

    def abort(self) -> None:
        """End what has not finished. The engine's next steps clear it away; what they bring is not for `push`."""
        for engine_id in self._by_id:
            self._core.abort(engine_id)

    def _push(self, delta: TokenDelta) -> None:
        live = self._by_id.get(delta.request_id)
        if live is None:
            return
        live.push(delta)
        for engine_id in live.take_aborts():
            self._core.abort(engine_id)
        if live.error is not None:
            raise live.error
        if live.finished:
            self._finish(live)
        elif delta.num_cached_tokens is not None:
            # The first token is out; from here on, plain sequences take the short way.
            token_ids = live.plain_token_ids(delta.request_id)
            if token_ids is not None:
                self._plain[delta.request_id] = token_ids

    def _finish(self, live: Live) -> None:
        output = live.take()
        assert output is not None, "a request that has finished has something to show"
        self._results[live.first_id] = output
        for engine_id in live.engine_ids:
            del self._by_id[engine_id]
            self._plain.pop(engine_id, None)
        self.num_open -= 1
