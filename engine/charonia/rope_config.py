"""Rotary position embeddings as a checkpoint's config.json describes them. Torch-free.

Both forms are read: `rope_parameters` (which holds theta, and may be nested by layer type) and the older
`rope_scaling` next to `rope_theta`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from charonia.errors import ModelLoadError


class LinearScaling(msgspec.Struct, frozen=True):
    """Position interpolation (Chen et al., 2023): every frequency is divided by `factor`."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True):
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class YarnScaling(msgspec.Struct, frozen=True):
    """YaRN (Peng et al., 2023): a ramp over the frequencies, from kept to interpolated, and a temperature."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies cosines and sines."""
    beta_fast: float
    """Pairs that turn more often within the original context are kept."""
    beta_slow: float
    """Pairs that turn less often are interpolated."""
    truncate: bool
    """Round the ends of the ramp to whole dimensions."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RopeConfig(msgspec.Struct, frozen=True):
    """One rotary embedding; layers with equal ones share their table."""

    theta: float
    """Base of the wavelengths."""
    scaling: RopeScaling | None = None

    def max_position(self, max_position_embeddings: int) -> int:
        """Context length in tokens: `max_position_embeddings`, stretched where scaling extends it.

        By convention, linear scaling multiplies the stated length. YaRN multiplies the original
        length, unless config.json already states more.
        """
        match self.scaling:
            case LinearScaling(factor=factor):
                return int(max_position_embeddings * factor)
            case YarnScaling(factor=factor, original_max_position_embeddings=original):
                return max(max_position_embeddings, int(original * factor))
            case _:
                return max_position_embeddings


def parse_rope(parameters: Mapping[str, Any], *, theta: float, max_position_embeddings: int) -> RopeConfig:
    """Read one flat dict of rope parameters (`rope_type` or the older `type`, and that type's own keys).

    Args:
        parameters: the dict; empty means the default type.
        theta: base if the dict holds no `rope_theta`.
        max_position_embeddings: stands in for a missing `original_max_position_embeddings`.

    Raises:
        ModelLoadError: an unknown type, or a missing or bad key; the message names it.
    """
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    try:
        raw = msgspec.convert({"rope_theta": theta, **parameters}, _RawRope)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"config.json: bad rope parameters: {error}") from None
    if raw.partial_rotary_factor not in (None, 1.0):
        raise ModelLoadError("config.json: 'partial_rotary_factor' other than 1 is not supported")
    base = raw.rope_theta or theta
    original = raw.original_max_position_embeddings or max_position_embeddings
    match rope_type:
        case "default":
            return RopeConfig(base)
        case "linear":
            return RopeConfig(base, LinearScaling(_required(raw.factor, "factor", rope_type)))
        case "llama3":
            factor = _required(raw.factor, "factor", rope_type)
            low = _required(raw.low_freq_factor, "low_freq_factor", rope_type)
            high = _required(raw.high_freq_factor, "high_freq_factor", rope_type)
            if low >= high:
                raise ModelLoadError(
                    "config.json: rope's 'low_freq_factor' must be below its 'high_freq_factor'"
                )
            return RopeConfig(base, Llama3Scaling(factor, low, high, original))
        case "yarn":
            return RopeConfig(base, _yarn(raw, original, max_position_embeddings))
        case _:
            raise ModelLoadError(
                f"config.json: rope type {rope_type!r} is not supported; supported are "
                f"{', '.join(SUPPORTED_ROPE_TYPES)}"
            )


_Positive = Annotated[float, msgspec.Meta(gt=0)]
_AtLeastOne = Annotated[float, msgspec.Meta(ge=1)]


class _RawRope(msgspec.Struct, frozen=True):
    """The keys of all types. Unknown keys are ignored."""

    rope_theta: Annotated[float, msgspec.Meta(gt=1)] | None = None
    partial_rotary_factor: float | None = None
    factor: _AtLeastOne | None = None
    original_max_position_embeddings: Annotated[int, msgspec.Meta(gt=0)] | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    attention_factor: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    truncate: bool | None = None


def _required(value: float | None, key: str, rope_type: str) -> float:
    if value is None:
        raise ModelLoadError(f"config.json: rope parameters of type {rope_type!r} lack {key!r}")
    return value


def _yarn(raw: _RawRope, original: int, max_position_embeddings: int) -> YarnScaling:
    """Fill in what YaRN derives: the factor from the context lengths, the attention factor from that."""
    factor = raw.factor or max_position_embeddings / original
    attention_factor = raw.attention_factor
    if attention_factor is None and raw.mscale and raw.mscale_all_dim:
        attention_factor = _mscale(factor, raw.mscale) / _mscale(factor, raw.mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor or _mscale(factor, 1.0),
        beta_fast=raw.beta_fast or 32.0,
        beta_slow=raw.beta_slow or 1.0,
        truncate=raw.truncate is not False,
    )


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context `factor` times as long."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
