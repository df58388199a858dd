"""Tells log and tracer about requests that have ended, on a thread where nobody waits for it."""

import queue
import threading
from collections.abc import Callable, Sequence

from charonia.triton.request_record import RequestRecord

MAX_WAITING = 4096
"""Most records that wait; those past it are dropped and counted."""


class RequestReporter:
    """A bounded mailbox of records, and the thread that hands them to `sinks`.

    A line in the server's log blocks for about 0.2 ms, so a flood of requests may outrun this thread, and must not
    make anything else slow. warn: told of dropped records, and of sinks that fail.
    """

    def __init__(self, sinks: Sequence[Callable[[RequestRecord], None]], warn: Callable[[str], None]) -> None:
        self._sinks = sinks
        self._warn = warn
        self._waiting: queue.Queue[RequestRecord | None] = queue.Queue(MAX_WAITING)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="charonia-reporter", daemon=True)
        if sinks:
            self._thread.start()

    def note(self, record: RequestRecord) -> None:
        """Take a record; returns at once."""
        if not self._sinks:
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._num_dropped += 1

    def stop(self) -> None:
        """End the thread once all that waits has been told."""
        if self._sinks:
            self._waiting.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            for sink in self._sinks:
                try:
                    sink(record)
                except Exception as error:
                    self._warn(
                        f"request {record.request_id or 'without id'} could not be reported: {error!r}"
                    )
            if self._num_dropped:
                num_dropped, self._num_dropped = self._num_dropped, 0
                self._warn(f"{num_dropped} ended requests are missing in log and traces: too many at once")
