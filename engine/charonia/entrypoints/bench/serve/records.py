"""What is noted of every request while load is generated, and the same as columns."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request. Times are nanoseconds of the monotonic clock, which all processes of a machine share.

    index: unique in a run. scheduled_ns: when it was due. sent_ns: just before its bytes were written.
    times_ns, tokens: one entry a response that brought tokens: when it was read, how many tokens it brought.
    reported_tokens: all output tokens as the server counts them, where it says so at the end.
    error: why it failed. ended_ns: 0 until it has ended. on_end: called once, when it has.
    """

    index: int
    on_end: "Callable[[RequestRecord], None]"
    scheduled_ns: int = 0
    sent_ns: int = 0
    ended_ns: int = 0
    prompt_tokens: int = 0
    reported_tokens: int | None = None
    error: str | None = None
    times_ns: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: "array[int]" = field(default_factory=lambda: array("q"))

    def respond(self, now_ns: int, num_tokens: int) -> None:
        """Note a response with tokens."""
        self.times_ns.append(now_ns)
        self.tokens.append(num_tokens)

    def end(self, now_ns: int, error: str | None = None) -> None:
        """Note that nothing more will come; only the first call counts."""
        if self.ended_ns:
            return
        self.ended_ns = now_ns
        if error is None and not self.times_ns:
            error = "the answer has no tokens"
        self.error = error
        self.on_end(self)


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Requests as columns [N]; times are seconds since the start of the run.

    responses: responses of each request [N]; times, tokens: of all responses, request after request [sum(responses)].
    errors: None where a request succeeded.
    """

    index: Ints
    scheduled: Floats
    sent: Floats
    ended: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    responses: Ints
    times: Floats
    tokens: Ints
    errors: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.errors)

    @classmethod
    def of(cls, requests: Sequence[RequestRecord], start_ns: int) -> "Records":
        """Columns of requests that have ended."""

        def seconds(values: Sequence[int] | Ints) -> Floats:
            return (np.asarray(values, np.int64) - start_ns) / 1e9

        counts = [
            sum(each.tokens) if each.reported_tokens is None else each.reported_tokens for each in requests
        ]
        return cls(
            index=np.array([each.index for each in requests], np.int64),
            scheduled=seconds([each.scheduled_ns for each in requests]),
            sent=seconds([each.sent_ns for each in requests]),
            ended=seconds([each.ended_ns for each in requests]),
            prompt_tokens=np.array([each.prompt_tokens for each in requests], np.int64),
            output_tokens=np.array(counts, np.int64),
            responses=np.array([len(each.times_ns) for each in requests], np.int64),
            times=seconds(_joined([each.times_ns for each in requests])),
            tokens=_joined([each.tokens for each in requests]),
            errors=tuple(each.error for each in requests),
        )

    @classmethod
    def concat(cls, parts: "Sequence[Records]") -> "Records":
        """All requests of several runs that began at the same moment."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in cls.__dataclass_fields__
            if name != "errors"
        }
        return cls(**columns, errors=tuple(error for part in parts for error in part.errors))


def _joined(parts: "Sequence[array[int]]") -> Ints:
    # The empty part stands in where there are none.
    return np.concatenate([np.empty(0, np.int64), *(np.frombuffer(part, np.int64) for part in parts if part)])
