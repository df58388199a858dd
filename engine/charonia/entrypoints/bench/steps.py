"""`charonia bench steps`: where the time of a decode step goes."""

import argparse
import gc
import random
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from charonia.config import EngineConfig, SchedulerConfig
from charonia.core.engine_core import EngineCore, StepTimes
from charonia.core.scheduler import Scheduler
from charonia.core.step import StepPlan, StepResult, TokenMasks
from charonia.entrypoints.bench.prompts import exactly, positive_int, random_prompts
from charonia.entrypoints.offline_batch import OfflineBatch
from charonia.errors import ConfigError
from charonia.model_config import ModelConfig
from charonia.serving.engine_builder import build_engine
from charonia.serving.input_processor import InputProcessor
from charonia.serving.live_request import LiveRequest
from charonia.serving.request import GenerationRequest

WARM_UP_STEPS = 8
HOST_BUDGET = 8192
"""Tokens a step with `--host-only`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--rows", type=positive_int, nargs="+", default=[1, 8, 64, 256, 512], metavar="N",
        help="sequences that decode together (default 1 8 64 256 512)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=positive_int, default=512, metavar="N", help="prompt tokens (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=64, metavar="N", help="steps to measure (default %(default)s)"
    )
    parser.add_argument(
        "--host-only",
        action="store_true",
        help="without a device: every step's tokens come at once, so that only the host's work is left",
    )


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds of one decode step, on average. host: all but `wait`. device: None where it is not measured.

    outputs: appending the tokens to the requests' outputs.
    """

    rows: int
    all: float
    schedule: float
    launch: float
    wait: float
    update: float
    outputs: float
    host: float
    device: float | None


class InstantExecutor:
    """No device: every row that samples gets the same token, at once."""

    def launch(self, plan: StepPlan) -> "_Instant":
        """The step has run already."""
        return _Instant(StepResult(plan.step_id, [1] * plan.num_sampled))

    def launch_undrawn(self, plan: StepPlan) -> "_Instant":
        """As `launch`: no mask changes what is drawn."""
        return self.launch(plan)

    def shutdown(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True)
class _Instant:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result

    def draw(self, masks: TokenMasks) -> "_Instant":
        return self


def measure(model: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Print the table row by row."""
    model_config = ModelConfig.from_dir(model)
    config = _engine_config(model, model_config, settings, options)
    inputs = InputProcessor(config, model_config, None)
    core = _host_only(config, options) if options.host_only else build_engine(config, model_config)[0]
    gc.collect()
    gc.freeze()
    names = [name for name in StepCost.__dataclass_fields__ if name != "rows"]
    print("milliseconds a step\n" + f"{'rows':>6}" + "".join(f"{name:>10}" for name in names))
    costs = []
    try:
        for rows in options.rows:
            cost = measure_rows(core, inputs, rows, options, vocab_size=model_config.vocab_size)
            costs.append(cost)
            values = [getattr(cost, name) for name in names]
            cells = [f"{'-':>10}" if value is None else f"{value:>10.3f}" for value in values]
            print(f"{rows:>6}" + "".join(cells), flush=True)
    finally:
        core.shutdown()
        gc.unfreeze()
    return {
        "context": options.context,
        "steps": options.steps,
        "host_only": options.host_only,
        "rows": [asdict(cost) for cost in costs],
    }


def measure_rows(
    core: EngineCore, inputs: InputProcessor, rows: int, options: argparse.Namespace, *, vocab_size: int
) -> StepCost:
    """Let `rows` sequences decode, and measure once all of them have begun."""
    prompts = random_prompts(random.Random(rows), rows, options.context, vocab_size)
    batch = OfflineBatch(core)
    # The sequences that begin first must still be there when the last has begun.
    params = exactly(inputs.max_model_len - options.context)
    for i, prompt in enumerate(prompts):
        request = GenerationRequest(prompt=prompt, params=params)
        live = LiveRequest(request, None, prompt, None, inputs.eos_token_ids, final_only=True)
        live.first_id = i
        batch.add(live, inputs.expand(request, prompt, i))
    pure = 0
    while batch.num_open == rows and pure < WARM_UP_STEPS:
        scheduled = core.stats().scheduled_tokens
        batch.push(core.step())
        # Steps that still compute prompts are of another kind, even once the first rows have begun to decode.
        pure = pure + 1 if core.stats().scheduled_tokens - scheduled == rows else 0
    if batch.num_open < rows:
        raise ConfigError(
            f"engine setting 'max_model_len' or the KV cache is too small for {rows} rows at once"
        )
    preemptions = core.stats().preemptions
    before, outputs, begin = replace(core.times), 0.0, time.perf_counter()
    for _ in range(options.steps):
        deltas = core.step()
        start = time.perf_counter()
        batch.push(deltas)
        outputs += time.perf_counter() - start
    seconds, times = time.perf_counter() - begin, core.times.since(before)
    if core.stats().preemptions != preemptions or batch.num_open < rows:
        raise ConfigError(f"the KV cache is too small for {rows} rows; lower --rows, --context or --steps")
    batch.abort()
    while core.has_work:
        core.step()
    return _cost(rows, options.steps, seconds, outputs, times)


def _cost(rows: int, steps: int, seconds: float, outputs: float, times: StepTimes) -> StepCost:
    scale = 1e3 / steps
    return StepCost(
        rows=rows,
        all=seconds * scale,
        schedule=times.schedule * scale,
        launch=times.launch * scale,
        wait=times.wait * scale,
        update=times.update * scale,
        outputs=outputs * scale,
        host=(seconds - times.wait) * scale,
        device=times.device / times.device_steps * 1e3 if times.device_steps else None,
    )


def _engine_config(
    model: str, model_config: ModelConfig, settings: dict[str, Any], options: argparse.Namespace
) -> EngineConfig:
    """As many rows and as long a context as the measurement needs, unless settings say otherwise."""
    rows = max(options.rows)
    # The first sequences decode all the while the others' prompts are computed.
    waves = -(-rows * options.context // (settings.get("max_num_batched_tokens") or 512))
    needed = options.context + waves + WARM_UP_STEPS + options.steps + 16
    defaults = {
        "max_num_seqs": rows,
        "max_model_len": min(needed, model_config.max_position),
        "max_waiting_requests": 1 << 30,
    }
    return EngineConfig.from_mapping({**defaults, **settings, "model": model})


def _host_only(config: EngineConfig, options: argparse.Namespace) -> EngineCore:
    """A scheduler with room for everything, and no device."""
    block_size = config.block_size or 16
    assert config.max_model_len is not None
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(config.max_num_batched_tokens or HOST_BUDGET, config.max_num_seqs),
        max_model_len=config.max_model_len,
        block_size=block_size,
        num_blocks=1 + max(options.rows) * -(-config.max_model_len // block_size),
        long_prefill_token_threshold=HOST_BUDGET // 4,
        max_waiting_requests=config.max_waiting_requests,
        enable_prefix_caching=config.enable_prefix_caching,
        lookahead=1 if config.async_scheduling else 0,
    )
    return EngineCore(Scheduler(scheduler_config), InstantExecutor(), lookahead=scheduler_config.lookahead)
