"""What a client asks of an embedding, and what a checkpoint says about how its embeddings are made."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from charonia.errors import InvalidRequestError

PoolingType = Literal["last", "mean", "cls"]
"""Which hidden states of the last layer become the embedding: the last token's, the mean of all, or the first token's.
"""


class PoolingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's own way to make embeddings.

    matryoshka_dimensions: the sizes to which an embedding may be cut; empty where the checkpoint lists none.
    """

    pooling_type: PoolingType = "last"
    normalize: bool = True
    matryoshka_dimensions: tuple[int, ...] = ()


class PoolingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How to make one embedding. Raises `InvalidRequestError` that names the offending field.

    pooling_type, normalize: the checkpoint's own by default; `normalize` scales the vector to length 1.
    dimensions: keep that many leading components (Matryoshka representations, Kusupati et al., 2022), before the
    vector is normalised; all by default.
    """

    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling_type not in (None, "last", "mean", "cls"):
            raise _refusal("pooling_type", "'last', 'mean' or 'cls'", self.pooling_type)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise _refusal("normalize", "a boolean", self.normalize)
        size = self.dimensions
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise _refusal("dimensions", "a positive integer", size)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "PoolingParams":
        """Build from loosely typed JSON values. Nulls are ignored.

        Values may come as text; `dimensions` may be a list of one number, which is how clients of Triton's vLLM
        backend send it. vLLM's `use_activation` is another name for `normalize`, and its `task` may be "embed".
        Raises `InvalidRequestError` for unknown keys and for values that do not fit, naming the key.
        """
        fields: dict[str, Any] = {}
        for key, value in values.items():
            if value is None:
                continue
            if key == "task":
                if value != "embed":
                    raise _refusal("task", "'embed'", value)
            elif key in ("normalize", "use_activation"):
                fields["normalize"] = _boolean(key, value)
            elif key == "dimensions":
                fields["dimensions"] = _size(value)
            elif key == "pooling_type":
                fields["pooling_type"] = value.lower() if isinstance(value, str) else value
            else:
                known = "dimensions, normalize, pooling_type, task, use_activation"
                raise InvalidRequestError(
                    f"unknown pooling parameter {key[:80]!r}; known parameters: {known}"
                )
        return cls(**fields)

    def resolve(self, config: PoolingConfig, hidden_size: int) -> "PoolingParams":
        """The parameters with every default filled in; `dimensions` stays None for all `hidden_size` components.

        Raises `InvalidRequestError` for a size that the model does not have.
        """
        size, listed = self.dimensions, config.matryoshka_dimensions
        if size is not None and size > hidden_size:
            raise _refusal("dimensions", f"from 1 to {hidden_size}", size)
        if size is not None and listed and size != hidden_size and size not in listed:
            raise _refusal("dimensions", f"one of {', '.join(map(str, listed))}", size)
        return PoolingParams(
            pooling_type=self.pooling_type or config.pooling_type,
            normalize=config.normalize if self.normalize is None else self.normalize,
            dimensions=size,
        )


def _size(value: object) -> object:
    """A number, from a list that holds just it or from text."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.strip().isdecimal() and len(value) <= 10:
        return int(value)
    return value


def _boolean(key: str, value: object) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise _refusal(key, "a boolean", value)
    return value


def _refusal(name: str, expectation: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"pooling parameter {name!r} must be {expectation}, got {str(value)[:80]!r}")
