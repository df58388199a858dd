"""An engine process without a model: everything of the real one but the device, which takes a set time a step.

    python benchmarks/serving/paced_engine.py STEP_MS DIR --owner-pid PID

Frontends start it: it is their `engine_command`, see `frontends.py`.

Scheduler, KV-cache accounting, step loop, socket and frames are the engine's own. A step "computes" for STEP_MS
milliseconds and brings tokens of ordinary English text, so that frontends have what they have in service.
"""

import itertools
import sys
import time

from charonia.config import EngineConfig
from charonia.core.engine_core import EngineCore
from charonia.core.scheduler import Scheduler
from charonia.core.step import StepPlan, StepResult
from charonia.model_config import ModelConfig
from charonia.serving import engine_process
from charonia.text import Tokenizer
from charonia.worker.setup import resolve

TEXT = """The trumpet shell is among the largest of the sea snails. It hunts starfish on coral reefs, which it finds
by their scent, and it is quick for a snail. People of many coasts have made horns of its shell for some 3,000 years."""


class _PacedStep:
    """A launched step, done `seconds` after the one before it."""

    def __init__(self, step_id: int, token_ids: list[int], due: float) -> None:
        self._result = StepResult(step_id, token_ids)
        self._due = due

    def wait(self) -> StepResult:
        """See `charonia.core.engine_core.PendingStep`."""
        time.sleep(max(0.0, self._due - time.monotonic()))
        return self._result


class PacedExecutor:
    """Steps that take `step_s` seconds each, one after the other, whatever they hold."""

    def __init__(self, step_s: float, token_ids: list[int]) -> None:
        self._step_s = step_s
        self._tokens = itertools.cycle(token_ids)
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> _PacedStep:
        """See `charonia.core.engine_core.Executor`."""
        self._free_at = max(self._free_at, time.monotonic()) + self._step_s
        return _PacedStep(plan.step_id, list(itertools.islice(self._tokens, plan.num_sampled)), self._free_at)

    def shutdown(self) -> None:
        """There is no device to release."""


def build(config: EngineConfig, model: ModelConfig) -> tuple[EngineCore, str]:
    """As `charonia.serving.engine_builder.build_engine`."""
    step_ms = float(sys.argv[1])
    token_ids = Tokenizer.from_dir(config.tokenizer_dir).encode(TEXT, add_special_tokens=False)
    limits = resolve(config, model)
    scheduler_config = limits.scheduler_config(config, config.num_kv_blocks_override or 100_000)
    executor = PacedExecutor(step_ms / 1000, token_ids)
    core = EngineCore(Scheduler(scheduler_config), executor, lookahead=scheduler_config.lookahead)
    return core, f"no model, {step_ms:g} ms a step"


if __name__ == "__main__":
    raise SystemExit(engine_process.main(sys.argv[2:], build))
