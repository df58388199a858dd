"""How the step loop reaches the device."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from charonia_kernels import cpu as cpu_kernels

from charonia.config import EngineConfig, SchedulerConfig
from charonia.core.step import StepPlan, StepResult
from charonia.model_config import ModelConfig
from charonia.models import load_model
from charonia.worker.model_runner import ModelRunner
from charonia.worker.setup import resolve


class _Pending:
    def __init__(self, future: "Future[StepResult]") -> None:
        self._future = future

    def wait(self) -> StepResult:
        return self._future.result()


class InProcessExecutor:
    """Runs one device from a thread of this process: `launch` returns at once, steps run in order beside the caller.

    Raises what loading raises: `ModelLoadError`, `ConfigError`.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="charonia-device")
        self._setup = resolve(config, model_config)
        threads = torch.get_num_threads()
        try:
            # Thread-bound device state (OpenMP pools, the current CUDA device) belongs to the thread that runs steps.
            self._runner = self._thread.submit(self._load, config, model_config).result()
        except BaseException:
            self._thread.shutdown()
            raise
        finally:
            # The device thread keeps its own setting; the caller's process keeps the one it had.
            torch.set_num_threads(threads)
        self.scheduler_config: SchedulerConfig = self._setup.scheduler_config(
            config, self._runner.kv_cache_size.num_blocks
        )

    def launch(self, plan: StepPlan) -> _Pending:
        """Queue a step behind those launched before."""
        return _Pending(self._thread.submit(self._run, plan))

    def shutdown(self) -> None:
        """Wait for launched steps and end the thread."""
        self._thread.shutdown()

    def describe(self) -> str:
        """One line for the log: device, dtype, KV cache."""
        size, setup = self._runner.kv_cache_size, self._setup
        tokens = (size.num_blocks - 1) * self.scheduler_config.block_size
        dtype = str(setup.dtype).removeprefix("torch.")
        return f"{setup.device} {dtype}, KV cache {size.gib:.2f} GiB = {tokens} tokens"

    def _load(self, config: EngineConfig, model_config: ModelConfig) -> ModelRunner:
        setup = self._setup
        if setup.device.type == "cpu":
            cpu_kernels.set_num_threads(setup.cpu_threads)
            # PyTorch gets threads only where it does the large products.
            native = setup.dtype == torch.bfloat16 and cpu_kernels.has_native_bf16()
            torch.set_num_threads(setup.cpu_threads if native else 1)
            cpu_kernels.warm_up(setup.dtype)
        loaded = load_model(config, model_config, device=setup.device, dtype=setup.dtype)
        return ModelRunner(config, model_config, setup, loaded.model)

    def _run(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan).result()
