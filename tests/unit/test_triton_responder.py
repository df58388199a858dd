"""Which thread sends the first response, and that nothing is lost as the engine's thread hands over."""

import threading
from collections.abc import Iterator

import pytest
from charonia.errors import CharoniaError, EngineDeadError
from charonia.outputs import CompletionOutput, FinishReason, RequestOutput
from charonia.serving.request import GenerationRequest
from charonia.triton.inputs import ParsedRequest, ResponseOptions
from charonia.triton.live_request import LiveRequest
from charonia.triton.pb import TritonUtils
from charonia.triton.responder import Responder
from support import fake_pb
from support.fake_pb import InferenceResponse, Sender

HERE = threading.current_thread().name
ANSWER_S = 10.0


class NotingSender(Sender):
    """Notes which thread sends, and can hold it up, as a server that lags would."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(fails=fails)
        self.threads: list[str] = []
        self.sending = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        self.threads.append(threading.current_thread().name)
        self.sending.set()
        assert self.go_on.wait(ANSWER_S)
        super().send(response, flags)

    @property
    def texts(self) -> list[str]:
        return [response.texts[0] for response in self.responses if response.error is None]


class Bench:
    """A responder of one sender thread, and what it has told of closed requests."""

    def __init__(self, num_live: int) -> None:
        self.closed: list[CharoniaError | None] = []
        self.aborted: list[object] = []
        self.responder = Responder(
            TritonUtils(fake_pb), num_senders=1, cancel_final_delay_s=0.01,
            on_closed=lambda request, error: self.closed.append(error),
            abort=self.aborted.append, num_live=lambda: num_live,
        )  # fmt: skip

    def request(self, sender: Sender, *, stream: bool = True) -> LiveRequest:
        live = self.responder.admit(sender)
        live.start(ParsedRequest(GenerationRequest(prompt="x"), ResponseOptions(stream=stream)))
        return live


@pytest.fixture
def alone() -> Iterator[Bench]:
    bench = Bench(num_live=1)
    yield bench
    bench.responder.stop()


def token(text: str, *, last: bool = False) -> RequestOutput:
    output = CompletionOutput(0, text, [1], finish_reason=FinishReason.LENGTH if last else None)
    return RequestOutput("", None, [1, 2], [output], finished=last)


def test_the_first_response_of_a_request_that_is_alone_leaves_at_once(alone: Bench) -> None:
    sender = NotingSender()
    request = alone.request(sender)
    request.on_output(token("a"))
    assert sender.texts == ["a"]
    request.on_output(token("b"))
    request.on_output(token("c", last=True))
    assert sender.finished.wait(ANSWER_S)
    assert "".join(sender.texts) == "abc"
    assert sender.threads[0] == HERE
    assert set(sender.threads[1:]) == {"charonia-sender-0"}
    assert sender.violations == []


@pytest.mark.parametrize(
    ("num_live", "stream", "last"), [(2, True, False), (1, False, True), (1, True, True)]
)
def test_whatever_others_could_wait_for_is_the_senders(num_live: int, stream: bool, last: bool) -> None:
    """With other requests live; and ends, which take two round trips and more."""
    bench = Bench(num_live)
    sender = NotingSender()
    request = bench.request(sender, stream=stream)
    request.on_output(token("a", last=last))
    if not last:
        request.on_output(token("b", last=True))
    assert sender.finished.wait(ANSWER_S)
    bench.responder.stop()
    assert set(sender.threads) == {"charonia-sender-0"}


def test_an_error_that_comes_meanwhile_is_sent_behind_the_first_response(alone: Bench) -> None:
    sender = NotingSender()
    sender.go_on.clear()
    request = alone.request(sender)
    engine = threading.Thread(target=request.on_output, args=(token("a"),))
    engine.start()
    assert sender.sending.wait(ANSWER_S)
    request.on_error(EngineDeadError("the engine was lost"))
    assert sender.threads == [engine.name]
    sender.go_on.set()
    engine.join()
    assert sender.finished.wait(ANSWER_S)
    assert sender.texts == ["a"]
    assert sender.responses[-1].error is not None
    assert sender.threads == [engine.name, "charonia-sender-0"]


def test_a_cancellation_that_comes_meanwhile_is_not_missed(alone: Bench) -> None:
    sender = NotingSender()
    sender.go_on.clear()
    request = alone.request(sender)
    request.attach("handle")
    engine = threading.Thread(target=request.on_output, args=(token("a"),))
    engine.start()
    assert sender.sending.wait(ANSWER_S)
    sender.cancelled = True
    assert request.poll_cancelled()
    request.wake_sender()
    sender.go_on.set()
    engine.join()
    assert sender.finished.wait(ANSWER_S)
    assert sender.responses[-1].error.code == "CANCELLED"
    assert alone.aborted == ["handle"]
    assert sender.violations == []


def test_an_error_before_the_first_output_leaves_the_request_to_the_sender(alone: Bench) -> None:
    sender = NotingSender()
    request = alone.request(sender)
    request.on_error(EngineDeadError("the engine was lost"))
    assert sender.finished.wait(ANSWER_S)
    request.on_output(token("a"))
    assert set(sender.threads) == {"charonia-sender-0"}


def test_a_first_response_that_cannot_be_sent_ends_the_request(alone: Bench) -> None:
    sender = NotingSender(fails=True)
    request = alone.request(sender)
    request.attach("handle")
    request.on_output(token("a"))
    assert sender.finished.is_set()
    request.on_output(token("b", last=True))
    assert alone.aborted == ["handle"]
    assert len(alone.closed) == len(sender.final_times) == 1
