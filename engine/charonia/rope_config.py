"""Rotary position embeddings as a checkpoint's config.json describes them. Torch-free.

Both forms are read: `rope_parameters` (which holds theta, and may be nested by layer type) and the older
`rope_scaling` next to `rope_theta`.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from charonia.errors import ModelLoadError


class LinearScaling(msgspec.Struct, frozen=True, tag="linear"):
    """Position interpolation (Chen et al., 2023): every frequency is divided by `factor`."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True, tag="llama3"):
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class YarnScaling(msgspec.Struct, frozen=True, tag="yarn"):
    """YaRN (Peng et al., 2023): a ramp over the frequencies, from kept to interpolated, and a temperature."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies cosines and sines."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
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

        By the convention of the older form, linear scaling multiplies what config.json states. YaRN multiplies
        the original length, unless config.json already states more.
        """
        match self.scaling:
            case LinearScaling(factor=factor):
                return int(max_position_embeddings * factor)
            case YarnScaling(factor=factor, original_max_position_embeddings=original):
                return max(max_position_embeddings, int(original * factor))
            case _:
                return max_position_embeddings


def parse_rope(
    parameters: Mapping[str, Any], *, default_theta: float, max_position_embeddings: int
) -> RopeConfig:
    """Read one flat dict of rope parameters (`rope_type` or the older `type`, and that type's own keys).

    Args:
        parameters: the dict; empty means the default type.
        default_theta: base if the dict holds no `rope_theta`.
        max_position_embeddings: stands in for a missing `original_max_position_embeddings`.

    Raises:
        ModelLoadError: an unknown type, or a missing or mistyped key; the message names it.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ModelLoadError(
            f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("config.json: 'partial_rotary_factor' other than 1 is not supported")
    given.setdefault("original_max_position_embeddings", max_position_embeddings)
    if rope_type == "yarn":
        _complete_yarn(given, max_position_embeddings)
    try:
        theta = msgspec.convert(given.get("rope_theta", default_theta), float)
        if rope_type == "default":
            return RopeConfig(theta)
        scaling: RopeScaling = msgspec.convert({**given, "type": rope_type}, RopeScaling)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"config.json: bad rope parameters of type {rope_type!r}: {error}") from None
    if scaling.factor < 1.0:
        raise ModelLoadError(f"config.json: rope scaling factor must be at least 1, got {scaling.factor}")
    return RopeConfig(theta, scaling)


def _complete_yarn(given: dict[str, Any], max_position_embeddings: int) -> None:
    """Fill in what YaRN derives: the factor from the context lengths, the attention factor from that."""
    try:
        given.setdefault("factor", max_position_embeddings / given["original_max_position_embeddings"])
        if "attention_factor" in given:
            return
        mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            given["attention_factor"] = _mscale(given["factor"], mscale) / _mscale(
                given["factor"], mscale_all_dim
            )
        else:
            given["attention_factor"] = _mscale(given["factor"], 1.0)
    except (TypeError, ZeroDivisionError):
        raise ModelLoadError("config.json: rope parameters of type 'yarn' must be positive numbers") from None


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context `factor` times as long."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
