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
    """Judge by the last known token, by which a matcher moves on. A stop token counts only from `min_tokens` on.

    The end of a grammar is a stop, whatever `min_tokens` and `ignore_eos` say; either wins over the length.
    """
    last = request.token_ids[-1]
    if last in request.stop_token_ids and request.num_output_tokens >= request.data.sampling.min_tokens:
        return Stop(FinishReason.STOP, last)
    matcher = request.matcher
    if matcher is not None:
        matcher.accept(last)
        if matcher.complete:
            return Stop(FinishReason.STOP, last if last in matcher.end_token_ids else None)
    if len(request.token_ids) >= request.max_num_tokens:
        return Stop(FinishReason.LENGTH)
    return None
