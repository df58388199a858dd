"""Engine configuration: frozen data, validated once. Automatic choices return a new config."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import msgspec

from charonia.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
KVCacheDtype = Literal["auto", "fp8", "fp8_e4m3"]
SchedulingPolicy = Literal["fcfs", "priority"]

GIB = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that one engine needs to know. The names are vLLM's; `1/model.json` and `LLM(...)` take the same keys.

    Raises `ConfigError` that names the setting.
    """

    model: str
    """Directory of a Hugging Face checkpoint (config.json + safetensors)."""
    tokenizer: str | None = None
    """Directory of the tokenizer; the model's own by default."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts must be token ids, and outputs have no text. For `LLM` only."""
    served_model_name: str | None = None
    """Name of the model in the OpenAI API of `charonia serve`, instead of its name in Triton."""
    dtype: Dtype = "auto"
    """Of weights and activations; `auto` is the checkpoint's (float16 becomes bfloat16 on a CPU)."""
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    """`dummy` fills the weights with random values: for benchmarks without a checkpoint's safetensors."""
    max_model_len: int | None = None
    """Most tokens (prompt and output) of one sequence; the checkpoint's context length by default."""
    max_num_seqs: int = 256
    """Most sequences that run at once: rows of device state."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step; by default 512 on a CPU and 8192 on a GPU."""
    long_prefill_token_threshold: int | None = None
    """A step that leaves more than this many prompt tokens still to compute counts as a long prefill;
    by default a quarter of the token budget."""
    max_long_partial_prefills: int = 1
    """Most long prefills that advance in one step, so that they never starve decodes and short prompts."""
    max_waiting_requests: int = 1024
    """Bound of the waiting queue; requests past it are refused with UNAVAILABLE."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    """Launch step N+1 before the tokens of step N are read."""
    block_size: int | None = None
    """Tokens per KV-cache block; by default 16 on a CPU and 64 on a GPU."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and KV cache may take together."""
    cpu_kv_cache_gib: float = 2.0
    """KV-cache budget on a CPU, in GiB; never more than a quarter of the machine's memory."""
    num_kv_blocks_override: int | None = None
    """Exact number of KV-cache blocks, instead of sizing by memory."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """`auto` is the model's; `fp8` (e4m3, GPUs only) halves the cache."""
    tensor_parallel_size: int = 1
    quantization: None = None
    enable_lora: bool = False
    enforce_eager: bool = False
    """Run without CUDA graphs: slower, but quicker to start and easier to debug."""
    seed: int = 0
    """Seeds dummy weights, and sampling of requests that bring no seed of their own."""
    cpu_threads: int | None = None
    """Threads of the device work on a CPU; all cores by default."""
    stream_interval: int = 1
    """Tokens that a streamed response waits for; the first token and the end never wait. More than 1 saves time
    in frontends and clients at the price of a choppier stream."""
    step_timeout_s: float = 300.0
    """A step that takes longer is taken for hung: stacks are dumped and the engine process ends."""
    default_deadline_s: float | None = None
    """Deadline of requests that bring none, counted from arrival."""
    disable_log_stats: bool = False
    """Export no `vllm:` metrics, even where the model's parameter REPORT_CUSTOM_METRICS asks for them."""
    otlp_traces_endpoint: str | None = None
    """Where frontends send a span of each request, by OTLP over HTTP (`http://host:4318`); traced are requests
    that come with a sampled trace context, and those without any."""

    def __post_init__(self) -> None:
        positive = ("max_num_seqs", "max_long_partial_prefills", "max_waiting_requests",
                    "stream_interval")  # fmt: skip
        optional = ("max_model_len", "max_num_batched_tokens", "long_prefill_token_threshold", "block_size",
                    "num_kv_blocks_override", "cpu_threads")  # fmt: skip
        for name in positive + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"engine setting {name!r} must be a positive integer, got {value!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"engine setting 'gpu_memory_utilization' must be in (0, 1], got {self.gpu_memory_utilization!r}"
            )
        if self.cpu_kv_cache_gib <= 0 or self.step_timeout_s <= 0:
            raise ConfigError("engine settings 'cpu_kv_cache_gib' and 'step_timeout_s' must be positive")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine setting 'max_num_batched_tokens' ({self.max_num_batched_tokens}) must be at least "
                f"'max_num_seqs' ({self.max_num_seqs}), so that every running sequence can advance in a step"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                "engine setting 'tensor_parallel_size' must be 1: this build runs on one device"
            )
        if self.enable_lora:
            raise ConfigError(
                "engine setting 'enable_lora' must be false: this build serves no LoRA adapters"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "EngineConfig":
        """Build from JSON-like values (`1/model.json`), with strict types. Raises `ConfigError` that names the key."""
        known = {field.name for field in msgspec.structs.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown engine setting {unknown[0]!r}; known settings: {', '.join(sorted(known))}"
            )
        try:
            return msgspec.convert(dict(values), cls)
        except ConfigError:
            raise
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise _bad_value(values, error) from None

    @property
    def tokenizer_dir(self) -> str:
        """Where the tokenizer's files are."""
        return self.tokenizer or self.model


def _bad_value(values: Mapping[str, Any], error: msgspec.ValidationError) -> ConfigError:
    """What is wrong with the one value that does not have its setting's type."""
    problem, _, path = str(error).partition(" - at `$.")
    key = path.rstrip("`")
    problem = problem.replace("Expected", "must be", 1)
    kind = EngineConfig.__annotations__.get(key)
    if get_origin(kind) is Literal:
        problem = f"must be {' or '.join(map(repr, get_args(kind)))}, got {values[key]!r}"
    elif key == "quantization":
        problem = f"must be null, got {values[key]!r}: this build serves no quantised weights"
    return ConfigError(f"engine setting {key!r} {problem}")


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's limits, all resolved to numbers."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    """KV-cache blocks, the null block (0) included."""
    long_prefill_token_threshold: int
    max_long_partial_prefills: int = 1
    max_waiting_requests: int = 1024
    policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    lookahead: int = 1
    """Steps that may be in flight beside the one being scheduled: 1 with async scheduling, else 0."""
    whole_prompts: bool = False
    """Prompts are never cut into chunks (encoders, whose tokens see the whole prompt). None may exceed the budget."""
