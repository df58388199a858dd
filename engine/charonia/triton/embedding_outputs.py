"""From an embedding to response tensors."""

import msgspec
import numpy as np

from charonia.outputs import EmbeddingRequestOutput, RequestOutput
from charonia.triton.inputs import ResponseOptions
from charonia.triton.outputs import encode_strings, encode_timings
from charonia.triton.pb import AnyArray


class EmbeddingAssembler:
    """The counterpart of `ResponseAssembler`: one output, one response. `text_output` is a JSON list of numbers."""

    num_sequences = 1
    num_tokens = 0
    finish_reasons: tuple[str, ...] = ()
    has_content = False
    """There is never anything to show before the end."""

    def __init__(self, options: ResponseOptions) -> None:
        self._options = options
        self._last: EmbeddingRequestOutput | None = None

    def add(self, output: RequestOutput | EmbeddingRequestOutput) -> None:
        """Take the output."""
        assert isinstance(output, EmbeddingRequestOutput)
        self._last = output

    @property
    def last(self) -> EmbeddingRequestOutput | None:
        """The output, once it is there."""
        return self._last

    @property
    def finished(self) -> bool:
        """Whether it is."""
        return self._last is not None

    def take(self) -> dict[str, AnyArray]:
        """The output tensors."""
        assert self._last is not None
        return {
            "text_output": encode_strings([msgspec.json.encode(self._last.outputs.embedding)]),
            **{name: self._optional(name, self._last) for name in self._options.outputs},
        }

    @staticmethod
    def _optional(name: str, last: EmbeddingRequestOutput) -> AnyArray:
        match name:
            case "num_input_tokens":
                return np.array([len(last.prompt_token_ids)], np.uint32)
            case "num_output_tokens":
                return np.array([0], np.uint32)
            case "finish_reason":
                return encode_strings(["stop"])
            case "timings":
                return encode_strings([encode_timings(last)])
        raise AssertionError(f"an embedding has no output named {name!r}")
