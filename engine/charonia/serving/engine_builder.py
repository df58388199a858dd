"""Puts an engine together: scheduler, executor and step loop."""

import time

from charonia.config import EngineConfig
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.model_config import ModelConfig
from charonia.worker.executor import InProcessExecutor


def build_engine(config: EngineConfig, model: ModelConfig) -> tuple[EngineCore, str]:
    """Load the model and return its engine, with one line for the log. Raises `ModelLoadError` or `ConfigError`."""
    start = time.monotonic()
    executor = InProcessExecutor(config, model)
    scheduler_config = executor.scheduler_config
    core = EngineCore(Scheduler(scheduler_config), executor, lookahead=scheduler_config.lookahead)
    return core, f"{model.architecture} on {executor.describe()}, loaded in {time.monotonic() - start:.1f} s"
