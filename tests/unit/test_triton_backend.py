"""The adapter as a whole, between a fake stub and a scripted engine: ends, cancellation, laggards, failures, drain."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from charonia.config import EngineConfig
from charonia.errors import ConfigError
from charonia.serving.request import GenerationRequest, OutputSink
from charonia.triton import backend as backend_module
from charonia.triton.backend import TritonBackend
from charonia.triton.cancellation import MAX_PAUSE_S
from charonia.triton.health import ServerExit
from charonia.triton.intake import MAX_INLINE_BYTES, MAX_INLINE_IDS
from charonia.triton.pb import TritonUtils
from charonia.triton.settings import BackendOptions, InstanceInfo
from support import fake_pb
from support.fake_engine import FakeEngine
from support.fake_pb import Request, Sender, flag, text

INSTANCE = InstanceInfo(
    model_name="llm", model_version="1", instance_name="llm_0_0", kind="MODEL", device_id=0,
    version_dir=Path("/nowhere"), parameters={},
)  # fmt: skip
FINAL_DELAY_S = 0.25
LONG = " " * (MAX_INLINE_BYTES + 1)
"""Makes a prompt one that intake's threads tokenise."""


class NoExit(ServerExit):
    """A server that keeps running until told otherwise."""

    def __init__(self) -> None:
        super().__init__(0)
        self.exiting = False

    def arm(self) -> None:
        pass

    @property
    def seen(self) -> bool:
        return self.exiting


class Bench:
    """A backend with everything around it."""

    def __init__(
        self, tmp_path: Path, engine: FakeEngine | None = None,
        engine_settings: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.engine = engine or FakeEngine(tmp_path / "events.jsonl")
        self.exit = NoExit()
        self.events_path = tmp_path / "events.jsonl"
        settings = {"drain_timeout_s": 0.2} | options
        self.backend = TritonBackend(
            TritonUtils(fake_pb), self.engine, INSTANCE, BackendOptions(**settings),
            server_exit=self.exit, runtime_dir=tmp_path,
            config=EngineConfig(model="scripted", **(engine_settings or {})),
        )  # fmt: skip

    def send(self, prompt: str, sender: Sender | None = None, **inputs: Any) -> Sender:
        sampling = {"sampling_parameters": text('{"max_tokens": 1000}')}
        request = Request(
            {"text_input": text(prompt)} | sampling | inputs, request_id=prompt[-8:], sender=sender
        )
        self.backend.execute([request])
        return request.sender

    def events(self, kind: str) -> list[dict]:
        lines = self.events_path.read_text().splitlines() if self.events_path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    fake_pb.MetricFamily.known.clear()
    fake_pb.Logger.lines.clear()
    bench = Bench(tmp_path)
    yield bench
    bench.backend.shutdown()


def done(sender: Sender) -> Sender:
    assert sender.finished.wait(10), "no FINAL"
    time.sleep(0.05)
    assert len(sender.final_times) == 1
    assert sender.violations == []
    return sender


def error_of(sender: Sender) -> tuple[str, str]:
    error = done(sender).responses[-1].error
    assert error is not None
    return error.code, error.message


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_one_response_when_not_streaming(bench: Bench) -> None:
    sender = done(bench.send("one two three"))
    assert [response.texts for response in sender.responses] == [["one two threeone two three"]]
    excluded = done(bench.send("one two three", exclude_input_in_output=flag(True)))
    assert [response.texts for response in excluded.responses] == [["one two three"]]


def test_a_response_per_token_when_streaming(bench: Bench) -> None:
    script = '@{"delay_s": 0.1} one two three four'
    sender = done(bench.send(script, stream=flag(True), return_finish_reason=flag(True)))
    assert [response.texts[0] for response in sender.responses] == ["one", " two", " three", " four"]
    reasons = [response.outputs["finish_reason"][0] for response in sender.responses]
    assert reasons == [b"None", b"None", b"None", b"stop"]


def test_no_response_is_empty_but_an_end_that_brings_nothing(bench: Bench) -> None:
    script = '@{"delay_s": 0.1, "quiet": true, "bare_end": true} a b'
    sender = done(
        bench.send(
            script, stream=flag(True), return_finish_reason=flag(True), return_num_output_tokens=flag(True)
        )
    )
    assert [response.texts[0] for response in sender.responses] == ["a", " b", ""]
    assert sender.responses[-1].outputs["finish_reason"].tolist() == [b"stop"]
    assert all(response.outputs["num_output_tokens"][0] > 0 for response in sender.responses)


def test_a_stream_interval_lets_tokens_gather_but_for_the_first_and_the_last(tmp_path: Path) -> None:
    bench = Bench(tmp_path, engine_settings={"stream_interval": 4})
    sender = done(bench.send('@{"tokens": 11, "delay_s": 0.02}', stream=flag(True)))
    assert [len(response.texts[0].split()) for response in sender.responses] == [1, 4, 4, 2]
    bench.backend.shutdown()


def test_a_lagging_sender_merges_and_loses_nothing(bench: Bench) -> None:
    slow = bench.send('@{"tokens": 200}', Sender(send_s=0.02), stream=flag(True))
    sender = done(slow)
    pieces = [response.texts[0] for response in sender.responses]
    assert "".join(pieces) == " ".join(f"w{i}" for i in range(200))
    assert len(pieces) < 50


def test_neighbours_of_a_slow_client_go_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, response_senders=2)
    slow = bench.send('@{"tokens": 50, "delay_s": 0.001}', Sender(send_s=0.2), stream=flag(True))
    begun = time.monotonic()
    done(bench.send("a b c", stream=flag(True)))
    assert time.monotonic() - begun < 1.0
    done(slow)
    bench.backend.shutdown()


@pytest.mark.parametrize("code", ["INVALID_ARG", "NOT_FOUND", "UNSUPPORTED", "UNAVAILABLE", "INTERNAL"])
def test_errors_carry_their_code_and_end_the_request(bench: Bench, code: str) -> None:
    assert error_of(bench.send(f'@{{"error": "{code}"}} x', stream=flag(True))) == (code, "scripted error")
    later = bench.send(f'@{{"error": "{code}", "error_after": 2}} a b c', stream=flag(True))
    assert error_of(later) == (code, "scripted error")


def test_errors_begin_with_their_code_where_the_request_asks_for_it(bench: Bench) -> None:
    request = Request(
        {"text_input": text('@{"error": "NOT_FOUND"} x')}, parameters='{"charonia_error_codes": "true"}'
    )
    bench.backend.execute([request])
    assert error_of(request.sender) == ("NOT_FOUND", "[NOT_FOUND] scripted error")


@pytest.mark.parametrize(
    "parameters",
    ['{"charonia_error_codes": false}', '{"charonia_error_codes": "no"}', '["charonia_error_codes"]'],
)
def test_errors_stay_as_they_are_where_their_code_is_not_wanted(bench: Bench, parameters: str) -> None:
    request = Request({"text_input": text(b"\xff")}, parameters=parameters)
    bench.backend.execute([request])
    code, message = error_of(request.sender)
    assert code == "INVALID_ARG" and not message.startswith("[")


def lines_after(bench: Bench, request_id: str) -> list[str]:
    """The log once it has a line of a request that is sent now."""
    done(bench.send(request_id))
    deadline = time.monotonic() + 5
    while not any(f"id={request_id} " in line for line in fake_pb.Logger.lines):
        assert time.monotonic() < deadline, "no line"
        time.sleep(0.01)
    return fake_pb.Logger.lines


def test_utilities_need_no_engine_and_count_as_no_request(bench: Bench) -> None:
    request = Request({"utility_request": text('{"model_info": {}}')})
    bench.backend.execute([request])
    (response,) = done(request.sender).responses
    assert json.loads(response.texts[0]) == {"asked": {"model_info": {}}}
    assert bench.engine.submitted == []
    assert not any("model_info" in line for line in fake_pb.Logger.lines)
    unknown = Request({"utility_request": text('{"unknown": {}}')}, request_id="a-utility")
    wrong = Request({"utility_request": text("[]")})
    bench.backend.execute([unknown, wrong])
    assert error_of(unknown.sender)[0] == error_of(wrong.sender)[0] == "INVALID_ARG"
    assert not any("a-utility" in line for line in lines_after(bench, "counted"))


def test_errors_of_the_request_itself(bench: Bench) -> None:
    assert error_of(bench.send("x", sampling_parameters=text("{")))[0] == "INVALID_ARG"
    assert error_of(bench.send("x", image=text("x")))[0] == "UNSUPPORTED"
    assert bench.engine.submitted == []


def test_a_bug_ends_its_request_and_tells_the_client_nothing_of_it(bench: Bench) -> None:
    code, message = error_of(bench.send('@{"crash": true} x'))
    assert code == "INTERNAL"
    assert "secret" not in message
    assert any("secret" in line for line in fake_pb.Logger.lines)
    done(bench.send("still alive"))

    class BrokenRequest(Request):
        def inputs(self) -> Any:
            raise RuntimeError("shared memory is gone")

    broken = BrokenRequest()
    bench.backend.execute([broken])
    assert error_of(broken.sender)[0] == "INTERNAL"


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ({"queue_s": 60}, "queued"),
        ({"prefill_s": 60}, "prefilling"),
        ({"tokens": 9999, "delay_s": 0.005}, "decoding"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_cancellation_in_every_state(bench: Bench, script: dict, state: str, stream: bool) -> None:
    sender = bench.send("@" + json.dumps(script) + " x", stream=flag(stream))
    eventually(lambda: bench.events("submit"))
    time.sleep(0.1)
    cancelled_at = time.monotonic()
    sender.cancelled = True
    eventually(lambda: bench.events("abort"))
    abort = bench.events("abort")[0]
    assert abort["state"] == state
    assert abort["time"] - cancelled_at < MAX_PAUSE_S + 0.15
    assert error_of(sender)[0] == "CANCELLED"
    assert sender.final_times[0] - cancelled_at >= FINAL_DELAY_S
    assert sender.final_times[0] - cancelled_at < FINAL_DELAY_S + 0.5


def test_cancellation_before_the_engine_has_the_request(tmp_path: Path) -> None:
    class SlowToTake(FakeEngine):
        def submit(self, request: GenerationRequest, sink: OutputSink) -> Any:
            handle = super().submit(request, sink)
            time.sleep(0.3)
            return handle

    bench = Bench(tmp_path, SlowToTake(tmp_path / "events.jsonl"))
    script = '@{"tokens": 9999, "delay_s": 0.01}' + LONG
    cancelled = [bench.send(script, stream=flag(True)) for _ in range(6)]
    for sender in cancelled:
        sender.cancelled = True
    for sender in cancelled:
        assert error_of(sender)[0] == "CANCELLED"
    eventually(lambda: bench.engine.stats().num_running == 0)
    # Two intake threads: the requests behind the first two were never submitted.
    assert len(bench.engine.submitted) < 6
    bench.backend.shutdown()


def test_nothing_is_sent_between_a_cancellation_and_its_end(bench: Bench) -> None:
    sender = bench.send('@{"tokens": 9999, "delay_s": 0.002}', stream=flag(True))
    eventually(lambda: sender.responses)
    sender.cancelled = True
    eventually(lambda: bench.events("abort"))
    time.sleep(0.05)
    count = len(sender.responses)
    done(sender)
    assert len(sender.responses) == count + 1


def test_a_client_that_leaves_as_the_last_response_comes_is_waited_for(bench: Bench) -> None:
    sender = Sender()
    sender.cancelled = True  # noticed on closing: no sweep comes in between
    begun = time.monotonic()
    assert error_of(bench.send("a", sender))[0] == "CANCELLED"
    assert sender.final_times[0] - begun >= FINAL_DELAY_S


def test_no_delay_where_it_is_turned_off(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cancel_final_delay_ms=0)
    sender = bench.send('@{"queue_s": 60} x', stream=flag(True))
    eventually(lambda: bench.events("submit"))
    cancelled_at = time.monotonic()
    sender.cancelled = True
    assert error_of(sender)[0] == "CANCELLED"
    assert sender.final_times[0] - cancelled_at < FINAL_DELAY_S
    bench.backend.shutdown()


def test_hundreds_of_requests_end_once_each_and_never_break_the_rules(bench: Bench) -> None:
    senders = []
    for i in range(300):
        sender = bench.send('@{"delay_s": 0.003} a b c d e f g h', stream=flag(i % 2 == 0))
        if i % 3 == 0:
            threading.Timer(0.0005 * (i % 60), setattr, (sender, "cancelled", True)).start()
        senders.append(sender)
    assert all(sender.finished.wait(10) for sender in senders)
    done(senders[-1])
    assert all(len(sender.final_times) == 1 and not sender.violations for sender in senders)
    eventually(lambda: bench.engine.stats().num_running == 0)
    assert bench.backend._snapshot() == []


def test_a_client_that_is_gone_does_not_stop_its_sender_thread(tmp_path: Path) -> None:
    bench = Bench(tmp_path, response_senders=1)
    gone = bench.send("a b c d", Sender(fails=True), stream=flag(True))
    assert gone.finished.wait(5)
    assert gone.violations == []
    done(bench.send("a b", stream=flag(True)))
    assert bench.backend._snapshot() == []
    bench.backend.shutdown()


def test_a_fault_in_telemetry_does_not_stop_a_sender_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, response_senders=1)

    def fail(*_: object) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(bench.backend._telemetry, "note_closed", fail)
        done(bench.send("a b", stream=flag(True)))
    done(bench.send("a b", stream=flag(True)))
    assert bench.backend._snapshot() == []
    bench.backend.shutdown()


class SubmitThreads(FakeEngine):
    """Notes on which thread each request is submitted; holds up the prompts that say so."""

    def __init__(self, events_path: Path) -> None:
        super().__init__(events_path)
        self.threads: dict[str, str] = {}
        self.hold = threading.Event()

    def submit(self, request: GenerationRequest, sink: OutputSink) -> Any:
        self.threads[request.request_id] = threading.current_thread().name
        if isinstance(request.prompt, str) and request.prompt.startswith("hold"):
            self.hold.wait()
        return super().submit(request, sink)


def test_small_requests_cost_no_thread_and_others_never_hold_up_execute(tmp_path: Path) -> None:
    engine = SubmitThreads(tmp_path / "events.jsonl")
    bench = Bench(tmp_path, engine)

    def send(name: str, **inputs: Any) -> Sender:
        request = Request(inputs, request_id=name)
        bench.backend.execute([request])
        return done(request.sender)

    send("text", text_input=text("x"))
    send("ids", input_ids=np.zeros(MAX_INLINE_IDS, np.int32))
    send("long-text", text_input=text("x" + LONG))
    send("long-ids", input_ids=np.zeros(MAX_INLINE_IDS + 1, np.int32))
    send("chat", messages=text('[{"role": "user", "content": "x"}]'))
    here = threading.current_thread().name
    assert {name for name, thread in engine.threads.items() if thread == here} == {"text", "ids"}
    # Two hold up both threads, a third one waits: what comes then takes its turn behind it.
    held = [bench.send("hold" + LONG) for _ in range(3)]
    behind = Request({"text_input": text("x")}, request_id="behind")
    bench.backend.execute([behind])
    assert "behind" not in engine.threads
    engine.hold.set()
    for sender in [*held, behind.sender]:
        done(sender)
    assert engine.threads["behind"].startswith("charonia-intake")
    bench.backend.shutdown()


def test_a_flood_is_refused(tmp_path: Path) -> None:
    class Stuck(FakeEngine):
        hold = threading.Event()

        def submit(self, request: GenerationRequest, sink: OutputSink) -> Any:
            self.hold.wait()
            return super().submit(request, sink)

    engine = Stuck(tmp_path / "events.jsonl")
    bench = Bench(tmp_path, engine, {"max_waiting_requests": 3})
    senders = [bench.send("x" + LONG) for _ in range(10)]
    eventually(lambda: any(sender.responses for sender in senders))
    assert error_of(senders[-1])[0] == "UNAVAILABLE"
    engine.hold.set()
    ends = [done(sender).responses[-1].error for sender in senders]
    # Three wait, and each of the two threads may have taken one off them meanwhile.
    assert sum(error is None for error in ends) in (3, 4, 5)
    bench.backend.shutdown()


def test_a_dead_engine_ends_every_request_and_shows_in_readiness(bench: Bench) -> None:
    senders = [bench.send('@{"tokens": 999, "delay_s": 0.01}', stream=flag(True)) for _ in range(5)]
    eventually(lambda: all(sender.responses for sender in senders))
    assert bench.backend.is_ready
    bench.engine.die()
    assert {error_of(sender) for sender in senders} == {("UNAVAILABLE", "the engine was lost")}
    assert not bench.backend.is_ready


def test_a_server_that_exits_gets_time_to_drain_then_requests_are_aborted(bench: Bench) -> None:
    short = bench.send('@{"tokens": 5, "delay_s": 0.01}', stream=flag(True))
    endless = bench.send('@{"tokens": 9999, "delay_s": 0.01}', stream=flag(True))
    bench.exit.exiting = True
    assert error_of(endless) == ("UNAVAILABLE", "the server is shutting down")
    assert done(short).responses[-1].error is None
    assert not bench.backend.is_ready
    eventually(lambda: bench.engine.stats().num_running == 0)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    bench = Bench(tmp_path)
    endless = bench.send('@{"tokens": 9999, "delay_s": 0.01}', stream=flag(True))
    eventually(lambda: endless.responses)
    bench.backend.shutdown()
    assert error_of(endless)[0] == "UNAVAILABLE"
    assert threading.active_count() == before


def test_no_thread_outlives_a_shutdown_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    bench = Bench(tmp_path)
    done(bench.send("a b", stream=flag(True)))
    end = bench.engine.shutdown

    def fail(drain_timeout_s: float) -> None:
        end(drain_timeout_s)
        raise OSError("the engine's folder is gone")

    monkeypatch.setattr(bench.engine, "shutdown", fail)
    with pytest.raises(OSError, match="folder is gone"):
        bench.backend.shutdown()
    assert threading.active_count() == before


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.TritonUtils, "load", lambda: TritonUtils(fake_pb))
    (tmp_path / "llm" / "1").mkdir(parents=True)
    (tmp_path / "llm" / "1" / "model.json").write_text('{"model": "checkpoint", "max_num_seqs": 4}')
    config = {
        "model_transaction_policy": {"decoupled": True},
        "parameters": {"runtime_dir": {"string_value": str(tmp_path / "run")}},
    }
    args = {
        "model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_name": "llm_0_1",
        "model_instance_device_id": "0", "model_repository": str(tmp_path / "llm"), "model_version": "1",
        "model_name": "llm",
    }  # fmt: skip
    seen: list[tuple] = []

    def connect(config: EngineConfig, *, runtime_dir: Path, member: str, owner_pid: int) -> FakeEngine:
        seen.append((config, runtime_dir, member))
        return FakeEngine.attach(config, runtime_dir=runtime_dir, member=member, owner_pid=owner_pid)

    started = TritonBackend.start(args, connect=connect, default_model=lambda: pytest.fail("not asked for"))
    started.shutdown()
    (engine_config, runtime_dir, member) = seen[0]
    assert engine_config == EngineConfig(
        model=str(tmp_path / "llm/1/checkpoint"), max_num_seqs=4, device="cpu"
    )
    assert runtime_dir.parent == tmp_path / "run"
    assert member == "llm_0_1"
    monkeypatch.setattr(fake_pb.Tensor, "broken", True)
    with pytest.raises(ConfigError, match="numpy<2"):
        TritonBackend.start(args, connect=connect, default_model=lambda: pytest.fail("not asked for"))


def test_the_stub_loads_no_torch() -> None:
    root = Path(__file__).resolve().parents[2]
    model = root / "model_repository" / "llm" / "1"
    program = f"import sys; sys.path.insert(0, {str(model)!r}); import model; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert not {"torch", "transformers", "numba", "charonia_kernels"} & set(loaded.stdout.split())
    assert len((model / "model.py").read_text().splitlines()) <= 150
