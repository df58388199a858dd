"""Chunks of a stream, put together from prepared JSON: this runs for every token."""

from typing import Any

from pydantic_core import to_json

from charonia_client.gateway.generation import TokenCounts

_REASONS = {
    None: b"null", "stop": b'"stop"', "length": b'"length"', "tool_calls": b'"tool_calls"',
}  # fmt: skip


class ChunkWriter:
    """Writes the chunks of one answer as events.

    usage: every chunk has the member `usage`, null but in the last one, or wherever counts are given.
    """

    def __init__(self, object_name: str, answer_id: str, created: int, model: str, *, usage: bool) -> None:
        head = {"id": answer_id, "object": object_name, "created": created, "model": model}
        self._head = b"data: " + to_json(head)[:-1]
        self._with_usage = usage
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"

    def chunk(
        self,
        index: int,
        body: bytes,
        finish_reason: str | None,
        logprobs: Any = None,
        *,
        extra: dict[str, Any] | None = None,
        counts: TokenCounts | None = None,
    ) -> bytes:
        """One choice's piece. body: its members in JSON, such as ``"text":"a"``. extra: further members."""
        return b'%b,"choices":[{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._head,
            index,
            body,
            b"null" if logprobs is None else to_json(logprobs),
            _REASONS[finish_reason],
            b"," + to_json(extra)[1:-1] if extra else b"",
            self._tail if counts is None else self._usage_tail(counts),
        )

    def usage(self, counts: TokenCounts) -> bytes:
        """The last chunk, which has no choices."""
        return b'%b,"choices":[]%b' % (self._head, self._usage_tail(counts))

    @staticmethod
    def _usage_tail(counts: TokenCounts) -> bytes:
        return b',"usage":%b}\n\n' % to_json(counts.usage())
