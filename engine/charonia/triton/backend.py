"""One model instance inside its Python-backend stub: everything that `model.py` delegates to."""

import gc
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from charonia.config import EngineConfig
from charonia.errors import CharoniaError, EngineDeadError, ErrorCode, InvalidRequestError
from charonia.serving.processes import return_large_blocks
from charonia.triton.cancellation import CancellationSweeper
from charonia.triton.engine import ConnectEngine, EngineClient
from charonia.triton.health import DrainGuard, ServerExit
from charonia.triton.inputs import RawRequest
from charonia.triton.intake import Intake
from charonia.triton.live_request import LiveRequest
from charonia.triton.pb import PbRequest, TritonUtils
from charonia.triton.responder import Responder
from charonia.triton.runtime_dir import make_runtime_dir
from charonia.triton.settings import BackendOptions, InstanceInfo, pin_device, read_engine_config
from charonia.triton.telemetry import Telemetry, Tracer, load_tracer


class TritonBackend:
    """A frontend of one engine. Its threads: intake, senders, cancel sweeper, drain guard, metrics, request log.

    Several instances of a model are several processes, each with one of these, on one engine.
    """

    @classmethod
    def start(
        cls, args: Mapping[str, str], *, connect: ConnectEngine, default_model: Callable[[], Path]
    ) -> "TritonBackend":
        """From the argument of `TritonPythonModel.initialize`; returns once the engine is ready.

        connect: joins or starts the model's engine. default_model: prepares the embedded default model. Raises
        `CharoniaError`, which fails the load with its message.
        """
        utils = TritonUtils.load()
        utils.check_numpy()
        return_large_blocks()
        instance = InstanceInfo.from_args(args)
        options = BackendOptions.from_parameters(instance.parameters)
        config = read_engine_config(instance, default_model, utils.log_warning)
        tracer = load_tracer(config.otlp_traces_endpoint, instance)
        pin_device(instance)
        # The stub is a child of the server.
        server_pid = os.getppid()
        runtime_dir = make_runtime_dir(
            options.runtime_dir, server_pid=server_pid, model=instance.engine_identity
        )
        engine = connect(config, runtime_dir=runtime_dir, member=instance.instance_name, owner_pid=server_pid)
        # What is alive now lives for ever: keep the collector from walking it again.
        gc.collect()
        gc.freeze()
        return cls(
            utils, engine, instance, options,
            server_exit=ServerExit(server_pid), runtime_dir=runtime_dir, config=config, tracer=tracer,
        )  # fmt: skip

    def __init__(
        self, utils: TritonUtils, engine: EngineClient, instance: InstanceInfo, options: BackendOptions, *,
        server_exit: ServerExit, runtime_dir: Path, config: EngineConfig, tracer: Tracer | None = None,
    ) -> None:  # fmt: skip
        self._utils = utils
        self._engine = engine
        self._server_exit = server_exit
        self._live: dict[int, LiveRequest] = {}
        self._live_lock = threading.Lock()
        self._drain_timeout_s = (
            server_exit.drain_timeout_s() if options.drain_timeout_s is None else options.drain_timeout_s
        )
        self._responder = Responder(
            utils,
            num_senders=options.response_senders,
            cancel_final_delay_s=options.cancel_final_delay_ms / 1000,
            on_closed=self._on_closed,
            abort=engine.abort,
            stream_interval=config.stream_interval,
            num_live=self._live.__len__,
        )
        self._intake = Intake(
            engine,
            max_pending=config.max_waiting_requests,
            ignored_parameters=options.ignored_request_parameters,
            on_unexpected=self._log_unexpected,
        )
        self._sweeper = CancellationSweeper(self._snapshot, self._on_cancelled, utils.log_warning)
        self._guard = DrainGuard(server_exit, self._drain_timeout_s, self._abort_all)
        self._telemetry = Telemetry(
            utils, engine, instance, options,
            lock_path=runtime_dir / "metrics.lock", with_vllm_metrics=not config.disable_log_stats, tracer=tracer,
        )  # fmt: skip

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests and the server is not on its way out."""
        return self._engine.is_ready and not self._guard.draining

    def execute(self, requests: Sequence[PbRequest]) -> None:
        """Take requests; returns at once, never raises: whatever is wrong with a request goes to its sender."""
        self._server_exit.arm()
        for request in requests:
            live = self._responder.admit(request.get_response_sender())
            with self._live_lock:
                self._live[id(live)] = live
            try:
                raw = RawRequest.take(request, with_trace=self._telemetry.traces)
                live.request_id = raw.request_id
                live.wants_error_codes = raw.wants_error_codes
                self._intake.hand_over(raw, live)
            except InvalidRequestError as error:
                live.on_error(error)
            except Exception as error:
                self._log_unexpected(live, error)
                live.on_error(CharoniaError("internal error; the server's log has the details"))
            # Behind the hand-over: waking a thread costs the request what it takes.
            self._sweeper.nudge()

    def shutdown(self) -> None:
        """Drain and detach. Triton calls `finalize` only once every request has ended, so this is quick.

        No thread may call the stub afterwards: all are ended, whatever goes wrong with one of them.
        """
        with ExitStack() as steps:
            # The last one named is the first to run.
            steps.callback(self._telemetry.stop)
            steps.callback(self._sweeper.stop)
            steps.callback(self._responder.stop)
            steps.callback(self._engine.shutdown, self._drain_timeout_s)
            steps.callback(self._intake.stop)
            steps.callback(self._guard.stop)

    def _snapshot(self) -> list[LiveRequest]:
        with self._live_lock:
            return list(self._live.values())

    def _on_closed(self, request: LiveRequest, error: CharoniaError | None) -> None:
        with self._live_lock:
            self._live.pop(id(request), None)
        if not request.is_utility:
            self._telemetry.note_closed(request, error)

    def _on_cancelled(self, request: LiveRequest) -> None:
        handle = request.end()
        if handle is not None:
            self._engine.abort(handle)
        request.wake_sender()

    def _abort_all(self) -> None:
        """The server is exiting and the time to drain is over."""
        remaining = self._snapshot()
        if remaining:
            self._utils.log_warning(f"the server is shutting down: aborting {len(remaining)} requests")
        for request in remaining:
            request.on_error(EngineDeadError("the server is shutting down"))

    def _log_unexpected(self, request: LiveRequest, error: Exception) -> None:
        trace = "".join(traceback.format_exception(error))
        self._utils.log_error(f"request {request.name}: {ErrorCode.INTERNAL}: {trace}")
