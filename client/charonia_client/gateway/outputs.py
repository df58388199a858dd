"""The model's optional outputs that an answer needs. Each costs something in every response of a stream."""

from collections.abc import Mapping
from typing import Any

from charonia_client.gateway.protocol import SamplingFields
from charonia_client.requests import InputValue


def output_flags(
    request: SamplingFields, parameters: Mapping[str, Any], *, tokens_details: bool
) -> dict[str, InputValue]:
    """The `return_...` inputs.

    parameters: the sampling parameters. tokens_details: whether streams tell how many tokens were cached.
    """
    names = ["finish_reason"]
    if not request.streams or request.includes_usage:
        names += ["num_input_tokens", "num_output_tokens"]
        if not request.streams or tokens_details:
            names.append("timings")
    names += [name for name in ("logprobs", "prompt_logprobs") if name in parameters]
    if request.stop or request.stop_token_ids:
        names.append("stop_reason")
    if request.return_token_ids:
        names.append("token_ids")
        if request.num_choices > 1 and "num_output_tokens" not in names:
            names.append("num_output_tokens")
    return {f"return_{name}": True for name in names}
