"""Puts an engine together: scheduler, executor and step loop."""

import time

from charonia.config import EngineConfig
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.model_config import ModelConfig
from charonia.serving.processes import python_executable
from charonia.structured.compiler import GrammarCompiler, num_compile_threads
from charonia.worker.executor import InProcessExecutor


def build_engine(config: EngineConfig, model: ModelConfig) -> tuple[EngineCore, str]:
    """Load the model and return its engine, with one line for the log. Raises `ModelLoadError` or `ConfigError`."""
    start = time.monotonic()
    grammars = _grammar_compiler(config, model)
    try:
        executor = InProcessExecutor(config, model)
    except BaseException:
        if grammars is not None:
            grammars.shutdown()
        raise
    scheduler = Scheduler(executor.scheduler_config, grammars=grammars)
    core = EngineCore(scheduler, executor, lookahead=executor.scheduler_config.lookahead)
    return core, f"{model.architecture} on {executor.describe()}, loaded in {time.monotonic() - start:.1f} s"


def _grammar_compiler(config: EngineConfig, model: ModelConfig) -> GrammarCompiler | None:
    """None where there is no tokenizer, or nothing to constrain."""
    if config.skip_tokenizer_init or not model.generates:
        return None
    return GrammarCompiler(
        config.tokenizer_dir,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        python=python_executable(),
        num_threads=num_compile_threads(),
    )
