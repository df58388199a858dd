"""What there is to tell about a request that has ended: for counters, log lines and spans."""

from dataclasses import dataclass

from charonia.errors import CharoniaError, ErrorCode, QueueFullError
from charonia.outputs import RequestTimings
from charonia.serving.request import EmbeddingRequest, GenerationRequest
from charonia.triton.live_request import LiveRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that has had its last response.

    arrival, ended: CLOCK_MONOTONIC, in seconds. timings: seconds from arrival; 0 for what never happened. refused:
    whether the engine did not take it. generation: what it asked for; None where it could not be parsed.
    finish_reasons: of the sequences that have ended, in their order; none for an embedding.
    """

    request_id: str
    arrival: float
    ended: float
    timings: RequestTimings
    refused: bool = False
    streamed: bool = False
    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    error: CharoniaError | None = None
    generation: GenerationRequest | EmbeddingRequest | None = None

    @classmethod
    def of(cls, request: LiveRequest, error: CharoniaError | None, now: float) -> "RequestRecord":
        """Of a request that has been closed at `now` (monotonic)."""
        assembler = request.assembler
        last = assembler.last if assembler is not None else None
        cancelled = error is not None and error.code is ErrorCode.CANCELLED
        refused = not cancelled and (not request.submitted or isinstance(error, QueueFullError))
        return cls(
            request_id=request.request_id,
            arrival=request.arrival,
            ended=now,
            timings=RequestTimings() if last is None else last.timings,
            refused=error is not None and refused,
            streamed=request.options.stream,
            num_sequences=0 if assembler is None else assembler.num_sequences,
            num_prompt_tokens=0 if last is None else len(last.prompt_token_ids),
            num_cached_tokens=0 if last is None else last.num_cached_tokens,
            num_generation_tokens=0 if assembler is None else assembler.num_tokens,
            finish_reasons=() if assembler is None else assembler.finish_reasons,
            error=error,
            generation=request.generation,
        )

    @property
    def outcome(self) -> str:
        """How it finished, or the error that ended it, in lower case."""
        if self.error is not None:
            return self.error.code.value.lower()
        return self.finish_reasons[-1] if self.finish_reasons else "stop"

    @property
    def total_seconds(self) -> float:
        """From its arrival to its last response."""
        return self.ended - self.arrival

    @property
    def decode_seconds(self) -> float:
        """From its first token to its last; 0 unless it ended well."""
        return max(0.0, self.timings.total - self.timings.first_token)
