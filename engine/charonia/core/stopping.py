"""When a sequence ends, as far as token ids tell. Stop strings are the frontends' affair."""

from dataclasses import dataclass

from charonia.outputs import FinishReason
from charonia.request import Request


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a sequence ended; `token_id` is the stop token, if one did it."""

    reason: FinishReason
    token_id: int | None = None


def check_stop(request: Request) -> Stop | None:
    """Judge by the last known token. A stop token counts only from `min_tokens` on, and wins over the length."""
    last = request.token_ids[-1]
    if last in request.stop_token_ids and request.num_output_tokens >= request.data.sampling.min_tokens:
        return Stop(FinishReason.STOP, last)
    if len(request.token_ids) >= request.max_num_tokens:
        return Stop(FinishReason.LENGTH)
    return None
