"""One line in the server's log for each request that has ended, in logfmt."""

import json
import re
from collections.abc import Callable, Mapping

from charonia.serving.request import ChatInput
from charonia.triton.request_record import RequestRecord

_MAX_ID_CHARS = 128
_MAX_TEXT_CHARS = 2048
"""Of a prompt or an error's message, in lines that have them."""

_PLAIN = re.compile(r"[\w.:/+@,-]+", re.ASCII)


class RequestLog:
    """Writes the lines; what clients wrote is in them only where `with_texts` asks for it.

    write: puts a line into the log. model: the model's name, which begins each line.
    """

    def __init__(self, write: Callable[[str], None], model: str, *, with_texts: bool) -> None:
        self._write = write
        self._model = model
        self._with_texts = with_texts

    def __call__(self, record: RequestRecord) -> None:
        """Write the line of a request."""
        fields = {"model": self._model, **_summary(record)}
        if self._with_texts:
            fields |= _texts(record)
        self._write("request " + logfmt(fields))


def _summary(record: RequestRecord) -> dict[str, object]:
    timings = record.timings
    fields: dict[str, object] = {"id": record.request_id[:_MAX_ID_CHARS], "outcome": record.outcome}
    if record.error is None:
        fields["finish_reasons"] = ",".join(record.finish_reasons)
    else:
        fields |= {"error_code": record.error.code.value, "refused": record.refused}
    return fields | {
        "stream": record.streamed,
        "sequences": record.num_sequences,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "generation_tokens": record.num_generation_tokens,
        "queue_s": timings.queue,
        "ttft_s": timings.first_token,
        "total_s": record.total_seconds,
    }


def _texts(record: RequestRecord) -> dict[str, object]:
    fields: dict[str, object] = {}
    if record.error is not None:
        fields["error"] = str(record.error)[:_MAX_TEXT_CHARS]
    if record.generation is not None:
        prompt = record.generation.prompt
        if isinstance(prompt, ChatInput):
            text = json.dumps(list(prompt.messages), ensure_ascii=False, default=str)
        else:
            text = prompt if isinstance(prompt, str) else ",".join(map(str, prompt[:_MAX_TEXT_CHARS]))
        fields["prompt"] = text[:_MAX_TEXT_CHARS]
    return fields


def logfmt(fields: Mapping[str, object]) -> str:
    """`key=value` pairs: seconds to the microsecond, texts as they are where they are plain, else as JSON strings."""
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
