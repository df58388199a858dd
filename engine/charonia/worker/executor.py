"""How the step loop reaches the device."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from charonia_kernels import cpu as cpu_kernels

from charonia.config import EngineConfig, SchedulerConfig
from charonia.core.engine_core import PendingStep, UndrawnStep
from charonia.core.step import StepPlan, StepResult, TokenMasks
from charonia.model_config import ModelConfig
from charonia.models import load_encoder, load_model
from charonia.worker.encoder_runner import EncoderRunner
from charonia.worker.memory import KVCacheSize
from charonia.worker.model_runner import ModelRunner, StartedStep
from charonia.worker.setup import DeviceSetup, resolve

logger = logging.getLogger("charonia.engine")

Runner = ModelRunner | EncoderRunner


@dataclass(frozen=True, slots=True)
class _ThreadedStep:
    future: "Future[StepResult]"

    def wait(self) -> StepResult:
        return self.future.result()


@dataclass(frozen=True, slots=True)
class _StartedStep:
    """On a GPU: the hidden states are under way."""

    runner: ModelRunner
    step: StartedStep

    def draw(self, masks: TokenMasks) -> PendingStep:
        """As `UndrawnStep`."""
        return self.runner.finish(self.step, masks)


@dataclass(frozen=True, slots=True)
class _ThreadedStart:
    """On a CPU: two tasks of one thread, which runs nothing in between."""

    thread: ThreadPoolExecutor
    runner: ModelRunner
    started: "Future[StartedStep]"

    def draw(self, masks: TokenMasks) -> PendingStep:
        """As `UndrawnStep`."""
        return _ThreadedStep(self.thread.submit(self._finish, masks))

    def _finish(self, masks: TokenMasks) -> StepResult:
        return self.runner.finish(self.started.result(), masks).wait()


class InProcessExecutor:
    """Runs one device in this process; `launch` returns at once, steps run in order beside the caller.

    A GPU works by itself: its steps are issued from the caller's thread. A CPU's steps run in a thread of their own.
    Raises what loading raises: `ModelLoadError`, `ConfigError`.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self._setup = resolve(config, model_config)
        self._thread: ThreadPoolExecutor | None = None
        if self._setup.device.type == "cpu":
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="charonia-device")
            self._runner, self._cache_size = self._load_in_thread(self._thread, config, model_config)
        else:
            torch.cuda.set_device(self._setup.device)
            self._runner, self._cache_size = _load(config, model_config, self._setup)
        self.scheduler_config: SchedulerConfig = self._setup.scheduler_config(
            config, self._cache_size.num_blocks
        )

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step behind those launched before."""
        if self._thread is None:
            return self._runner.execute(plan)
        return _ThreadedStep(self._thread.submit(self._run, plan))

    def launch_undrawn(self, plan: StepPlan) -> UndrawnStep:
        """As `launch`, up to where the tokens are drawn."""
        runner = self._runner
        assert isinstance(runner, ModelRunner), "encoders draw nothing"
        if self._thread is None:
            return _StartedStep(runner, runner.start(plan))
        return _ThreadedStart(self._thread, runner, self._thread.submit(runner.start, plan))

    def shutdown(self) -> None:
        """Wait for launched steps, and end the thread if there is one."""
        if self._thread is not None:
            self._thread.shutdown()
        else:
            torch.cuda.synchronize(self._setup.device)

    def describe(self) -> str:
        """One line for the log: device, dtype, KV cache."""
        size, setup = self._cache_size, self._setup
        tokens = (size.num_blocks - 1) * self.scheduler_config.block_size
        dtype = str(setup.dtype).removeprefix("torch.")
        return f"{setup.device} {dtype}, KV cache {size.gib:.2f} GiB = {tokens} tokens"

    def _load_in_thread(
        self, thread: ThreadPoolExecutor, config: EngineConfig, model_config: ModelConfig
    ) -> tuple[Runner, KVCacheSize]:
        threads = torch.get_num_threads()
        try:
            # Thread-bound state (OpenMP pools) belongs to the thread that runs steps.
            return thread.submit(_load, config, model_config, self._setup).result()
        except BaseException:
            thread.shutdown()
            raise
        finally:
            # The device thread keeps its own setting; the caller's process keeps the one it had.
            torch.set_num_threads(threads)

    def _run(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan).wait()


def _load(config: EngineConfig, model_config: ModelConfig, setup: DeviceSetup) -> tuple[Runner, KVCacheSize]:
    """Bring the model up, and log what each phase took."""
    phases: list[str] = []
    begin = time.perf_counter()

    def done(phase: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        phases.append(f"{phase} {now - begin:.2f} s")
        begin = now

    if setup.device.type == "cpu":
        cpu_kernels.set_num_threads(setup.cpu_threads)
        # PyTorch gets threads only where it does the large products.
        native = setup.dtype == torch.bfloat16 and cpu_kernels.has_native_bf16()
        torch.set_num_threads(setup.cpu_threads if native else 1)
        cpu_kernels.warm_up(setup.dtype)
        done("CPU kernels")
    runner: Runner
    if model_config.generates:
        loaded = load_model(config, model_config, device=setup.device, dtype=setup.dtype)
        runner = ModelRunner(config, model_config, setup, loaded.model)
    else:
        encoder = load_encoder(config, model_config, device=setup.device, dtype=setup.dtype)
        runner = EncoderRunner(model_config, setup, encoder.model)
    done("weights")
    runner.compile_kernels()
    done("kernels")
    size = runner.allocate_cache()
    done("KV cache")
    runner.capture_graphs()
    done("graphs")
    logger.info("start: %s", ", ".join(phases))
    return runner, size
