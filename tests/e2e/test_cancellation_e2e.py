"""Clients that leave, in every state of a request, seen by the real engine."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.abuse import LONG, boolean, ids, message, text_message
from support.launch import eventually
from support.served import TINY_FLAGS, Served, serving
from tritonclient.grpc import service_pb2_grpc

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

NOTICED_WITHIN_S = 1.0
"""About 100 ms on a quiet machine; the machines of tests are not."""
FINAL_DELAY_S = 0.25
"""How long after it was noticed a request is closed, by default (`cancel_final_delay_ms`)."""
RUNNING, WAITING = "charonia_requests_running", "charonia_requests_waiting"
LONG_PROMPT = 8000
"""Tokens; at two a step, its prefill takes seconds."""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """One request runs; prompts are computed a little at a time."""
    flags = ("--max-num-seqs=1", "--max-num-batched-tokens=2", "--no-enable-prefix-caching")
    with serving(tmp_path_factory.mktemp("slow"), str(tiny_model), *TINY_FLAGS, *flags) as served:
        yield served


class Call:
    """A request on a channel of its own, which stays open until the client leaves."""

    def __init__(self, served: Served, request: Any, timeout: float | None = None) -> None:
        self.sent_at = time.monotonic()
        self._leave = threading.Event()
        self._channel = grpc.insecure_channel(served.grpc_url)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.call = stub.ModelStreamInfer(self._requests(request), timeout=timeout)

    def _requests(self, request: Any) -> Iterator[Any]:
        yield request
        self._leave.wait(120)

    def leave(self, way: str, deadline_s: float) -> float:
        """Leave, or have left by the deadline. Returns the seconds since the request was sent."""
        if way == "cancel":
            self.call.cancel()
        elif way == "disconnect":
            self._channel.close()
        else:
            time.sleep(max(0.0, self.sent_at + deadline_s - time.monotonic()))
        return time.monotonic() - self.sent_at

    def close(self) -> None:
        self._leave.set()
        self.call.cancel()
        self._channel.close()


def request_in(state: str, name: str) -> Any:
    if state == "prefilling":
        return message({"input_ids": ids([7] * LONG_PROMPT), "stream": boolean(True)}, request_id=name)
    return text_message("Hello", LONG, request_id=name)


def seconds_until_closed(served: Served, name: str) -> float:
    """From a cancelled request's arrival, as its line in the log tells; only one that was decoding has tokens."""
    line = re.compile(rf"id={name} outcome=cancelled .* generation_tokens=(\d+) .* total_s=([\d.]+)")
    assert eventually(lambda: line.search(served.log.read_text()), 20), served.everything()
    found = line.search(served.log.read_text())
    assert found is not None
    assert (int(found[1]) > 0) == name.startswith("decoding")
    return float(found[2])


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
def test_a_client_that_leaves_is_noticed(slow: Served, state: str, way: str) -> None:
    """`cancel` ends the call, `disconnect` the connection, and a `deadline` passes by itself."""
    name, deadline_s = f"{state}-{way}", 1.5
    calls: list[Call] = []
    try:
        if state == "queued":
            calls.append(Call(slow, text_message("Hello", LONG)))
            assert not next(calls[0].call).error_message
        leaving = Call(slow, request_in(state, name), deadline_s if way == "deadline" else None)
        calls.append(leaving)
        gauge = WAITING if state == "queued" else RUNNING
        assert eventually(lambda: slow.metrics()[gauge] == 1, 20)
        if state == "decoding":
            assert not next(leaving.call).error_message
        stayed = leaving.leave(way, deadline_s)
        noticed = seconds_until_closed(slow, name) - FINAL_DELAY_S - stayed
        print(f"{name}: noticed within {noticed * 1e3:.0f} ms")
        assert noticed < NOTICED_WITHIN_S
    finally:
        for call in calls:
            call.close()
    assert slow.is_serving()
    slow.wait_idle()
