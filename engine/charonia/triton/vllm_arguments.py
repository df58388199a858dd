"""Engine arguments of vLLM that its Triton repositories hold in `1/model.json`, beside those that `EngineConfig` has.

A setting that `EngineConfig` knows is never looked up here. Every other one is renamed, ignored with a warning, taken
where its value is what this engine does anyway, or left for `EngineConfig` to refuse by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from charonia.config import EngineConfig
from charonia.errors import ConfigError

_KNOWN = frozenset(field.name for field in msgspec.structs.fields(EngineConfig))

_RENAMED = {"num_gpu_blocks_override": "num_kv_blocks_override"}

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}

_LOCAL = "models are local directories"
_LOG = "logging of requests is set in config.pbtxt"
_SCHEDULER = "prefills are always chunked, and preempted requests are computed again"
_ONE_PROCESS = "the engine is one process"
_LORA = "no LoRA adapters are served"
_GATEWAY = "this is a setting of the OpenAI gateway"
_OWN_CHOICE = "the engine chooses by itself"

WITHOUT_EFFECT: Mapping[str, str] = {
    "code_revision": _LOCAL,
    "download_dir": _LOCAL,
    "hf_token": _LOCAL,
    "ignore_patterns": _LOCAL,
    "revision": _LOCAL,
    "tokenizer_revision": _LOCAL,
    "use_tqdm_on_load": _LOCAL,
    "disable_log_requests": _LOG,
    "enable_log_requests": _LOG,
    "max_log_len": _LOG,
    "enable_chunked_prefill": _SCHEDULER,
    "max_num_partial_prefills": _SCHEDULER,
    "multi_step_stream_outputs": _SCHEDULER,
    "num_lookahead_slots": _SCHEDULER,
    "num_scheduler_steps": _SCHEDULER,
    "preemption_mode": _SCHEDULER,
    "scheduler_delay_factor": _SCHEDULER,
    "swap_space": _SCHEDULER,
    "use_v2_block_manager": _SCHEDULER,
    "disable_async_output_proc": _ONE_PROCESS,
    "disable_custom_all_reduce": _ONE_PROCESS,
    "disable_frontend_multiprocessing": _ONE_PROCESS,
    "distributed_executor_backend": _ONE_PROCESS,
    "engine_use_ray": _ONE_PROCESS,
    "max_parallel_loading_workers": _ONE_PROCESS,
    "ray_workers_use_nsight": _ONE_PROCESS,
    "tokenizer_pool_extra_config": _ONE_PROCESS,
    "tokenizer_pool_size": _ONE_PROCESS,
    "tokenizer_pool_type": _ONE_PROCESS,
    "worker_use_ray": _ONE_PROCESS,
    "fully_sharded_loras": _LORA,
    "lora_dtype": _LORA,
    "lora_extra_vocab_size": _LORA,
    "max_cpu_loras": _LORA,
    "max_lora_rank": _LORA,
    "max_loras": _LORA,
    "enable_auto_tool_choice": _GATEWAY,
    "enable_reasoning": _GATEWAY,
    "generation_config": _GATEWAY,
    "reasoning_parser": _GATEWAY,
    "tool_call_parser": _GATEWAY,
    "attention_backend": _OWN_CHOICE,
    "compilation_config": _OWN_CHOICE,
    "disable_cascade_attn": _OWN_CHOICE,
    "disable_mm_preprocessor_cache": _OWN_CHOICE,
    "guided_decoding_backend": _OWN_CHOICE,
    "max_context_len_to_capture": _OWN_CHOICE,
    "max_seq_len_to_capture": _OWN_CHOICE,
    "prefix_caching_hash_algo": _OWN_CHOICE,
    "structured_outputs_config": _OWN_CHOICE,
}
"""Settings that change how vLLM goes about it, never what a request is answered: any value, with a warning."""


@dataclass(frozen=True, slots=True)
class _Only:
    """A setting that is taken with these values alone. instead: what to do about another one."""

    values: tuple[Any, ...]
    instead: str = "this build has nothing else"


_ONE_DEVICE = _Only((1,), "this build runs on one device")
_NO_OVERRIDE = _Only(({},), "edit the checkpoint's config.json")

ONLY_WITH: Mapping[str, _Only] = {
    "trust_remote_code": _Only(
        (False,), "code that comes with a checkpoint is never run; the architectures served need none"
    ),
    "pipeline_parallel_size": _ONE_DEVICE,
    "data_parallel_size": _ONE_DEVICE,
    "decode_context_parallel_size": _ONE_DEVICE,
    "prefill_context_parallel_size": _ONE_DEVICE,
    "enable_expert_parallel": _Only((False,), "this build runs on one device"),
    "cpu_offload_gb": _Only((0,), "weights stay on the device"),
    "tokenizer_mode": _Only(("auto", "hf")),
    "model_impl": _Only(("auto",)),
    "config_format": _Only(("auto", "hf")),
    "task": _Only(("auto", "generate", "embed", "embedding")),
    "runner": _Only(("auto", "generate", "pooling")),
    "convert": _Only(("auto", "none", "embed")),
    "hf_overrides": _NO_OVERRIDE,
    "rope_scaling": _NO_OVERRIDE,
    "rope_theta": _Only((), "edit the checkpoint's config.json"),
    "disable_sliding_window": _Only((False,)),
    "enable_sleep_mode": _Only((False,)),
    "enable_prompt_embeds": _Only((False,)),
    "limit_mm_per_prompt": _Only(({},)),
    "mm_processor_kwargs": _Only(({},)),
    "max_logprobs": _Only((20,), "a request may ask for up to 20"),
    "speculative_config": _Only((), "there is no speculative decoding"),
    "speculative_model": _Only((), "there is no speculative decoding"),
    "num_speculative_tokens": _Only((), "there is no speculative decoding"),
}
"""Settings that may change answers or what a request may ask: taken where they say what is so anyway."""


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """Settings for `EngineConfig.from_mapping`, and what the log should say about the others."""

    settings: dict[str, Any]
    warnings: tuple[str, ...]


def read_vllm_arguments(values: Mapping[str, Any]) -> EngineArguments:
    """Sort out vLLM's arguments; null is each one's default. Raises `ConfigError` that names the setting."""
    settings: dict[str, Any] = {}
    warnings: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        if key in _KNOWN:
            settings[key] = _known_value(key, value)
        elif key in _RENAMED:
            settings.setdefault(_RENAMED[key], value)
        elif key in WITHOUT_EFFECT:
            warnings.append(f"engine setting {key!r} is ignored: {WITHOUT_EFFECT[key]}")
        elif key in ONLY_WITH:
            _check_value(key, value)
        else:
            settings[key] = value
    return EngineArguments(settings, tuple(warnings))


def _known_value(key: str, value: Any) -> Any:
    """The value in the form that `EngineConfig` takes."""
    if key == "dtype" and isinstance(value, str):
        return _DTYPE_ALIASES.get(value, value)
    if key == "enable_lora" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    return value


def _check_value(key: str, value: Any) -> None:
    only = ONLY_WITH[key]
    if any(type(value) is type(taken) and value == taken for taken in only.values):
        return
    if isinstance(value, float) and value in only.values:
        return
    shown = repr(value)[:80]
    if not only.values:
        raise ConfigError(f"engine setting {key!r} is not supported: {only.instead}")
    taken = " or ".join(map(repr, only.values))
    raise ConfigError(f"engine setting {key!r} must be {taken}, got {shown}: {only.instead}")
