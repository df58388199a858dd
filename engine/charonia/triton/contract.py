"""The model's tensors, declared once: the names, types and shapes of the serving contract."""

from dataclasses import dataclass
from typing import Any, Protocol

MAX_PROMPT_BYTES = 16 << 20
MAX_JSON_BYTES = 8 << 20
MAX_JSON_DEPTH = 64
MAX_CACHE_SALT_CHARS = 256
MAX_PRIORITY = 2**31 - 1

RETURN_PREFIX = "return_"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output; dims hold -1 where any length goes."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


INPUTS = (
    # The server only counts inputs: it takes a request that has `messages` or `input_ids` alone.
    TensorSpec("text_input", "TYPE_STRING", optional=False),
    TensorSpec("input_ids", "TYPE_INT32", (-1,)),
    TensorSpec("messages", "TYPE_STRING"),
    TensorSpec("image", "TYPE_STRING", (-1,)),
    TensorSpec("embedding_request", "TYPE_STRING"),
    TensorSpec("utility_request", "TYPE_STRING"),
    TensorSpec("stream", "TYPE_BOOL"),
    TensorSpec("sampling_parameters", "TYPE_STRING"),
    TensorSpec("exclude_input_in_output", "TYPE_BOOL"),
    TensorSpec("return_finish_reason", "TYPE_BOOL"),
    TensorSpec("return_cumulative_logprob", "TYPE_BOOL"),
    TensorSpec("return_logprobs", "TYPE_BOOL"),
    TensorSpec("return_num_input_tokens", "TYPE_BOOL"),
    TensorSpec("return_num_output_tokens", "TYPE_BOOL"),
    TensorSpec("return_token_ids", "TYPE_BOOL"),
    TensorSpec("return_timings", "TYPE_BOOL"),
    TensorSpec("return_prompt_logprobs", "TYPE_BOOL"),
    TensorSpec("return_stop_reason", "TYPE_BOOL"),
)

OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", (-1,)),
    TensorSpec("finish_reason", "TYPE_STRING", (-1,)),
    TensorSpec("cumulative_logprob", "TYPE_FP32", (-1,)),
    TensorSpec("logprobs", "TYPE_STRING", (-1,)),
    TensorSpec("num_input_tokens", "TYPE_UINT32"),
    TensorSpec("num_output_tokens", "TYPE_UINT32", (-1,)),
    TensorSpec("token_ids", "TYPE_INT32", (-1,)),
    TensorSpec("timings", "TYPE_STRING"),
    TensorSpec("prompt_logprobs", "TYPE_STRING"),
    TensorSpec("stop_reason", "TYPE_STRING", (-1,)),
)

BOOLEAN_INPUTS = frozenset(spec.name for spec in INPUTS if spec.data_type == "TYPE_BOOL")
OPTIONAL_OUTPUTS = frozenset(spec.name for spec in OUTPUTS) - {"text_output"}


class CompletableConfig(Protocol):
    """`pb_utils.ModelConfig`, as far as auto-completion needs it."""

    def as_dict(self) -> dict[str, Any]:
        """The configuration as it stands."""

    def add_input(self, declaration: dict[str, Any]) -> None:
        """Declare an input."""

    def add_output(self, declaration: dict[str, Any]) -> None:
        """Declare an output."""

    def set_model_transaction_policy(self, policy: dict[str, Any]) -> None:
        """Make the model decoupled or not."""

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Let Triton batch, or not (0)."""


def complete_config(config: CompletableConfig) -> CompletableConfig:
    """Fill in what the model's configuration leaves out; what it declares itself stays."""
    declared = config.as_dict()
    inputs = {entry["name"] for entry in declared.get("input", [])}
    outputs = {entry["name"] for entry in declared.get("output", [])}
    for spec in INPUTS:
        if spec.name not in inputs:
            declaration = {"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims)}
            config.add_input(declaration | ({"optional": True} if spec.optional else {}))
    for spec in OUTPUTS:
        if spec.name not in outputs:
            config.add_output({"name": spec.name, "data_type": spec.data_type, "dims": list(spec.dims)})
    config.set_model_transaction_policy({"decoupled": True})
    config.set_max_batch_size(0)
    return config
