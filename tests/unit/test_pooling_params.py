"""What clients may ask of an embedding."""

from typing import Any

import pytest
from charonia.errors import InvalidRequestError
from charonia.pooling_params import PoolingConfig, PoolingParams


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, PoolingParams()),
        ({"dimensions": None, "task": "embed"}, PoolingParams()),
        ({"dimensions": [32]}, PoolingParams(dimensions=32)),
        ({"dimensions": "32"}, PoolingParams(dimensions=32)),
        ({"dimensions": 32, "pooling_type": "MEAN"}, PoolingParams(dimensions=32, pooling_type="mean")),
        ({"normalize": False}, PoolingParams(normalize=False)),
        ({"use_activation": "true"}, PoolingParams(normalize=True)),
    ],
)
def test_values_are_cast_as_clients_send_them(values: dict[str, Any], expected: PoolingParams) -> None:
    assert PoolingParams.from_mapping(values) == expected


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"dimension": 3}, "unknown pooling parameter 'dimension'; known parameters: dimensions,"),
        ({"dimensions": 0}, "'dimensions' must be a positive integer, got '0'"),
        ({"dimensions": []}, "'dimensions' must be a positive integer"),
        ({"dimensions": [1, 2]}, "'dimensions' must be a positive integer"),
        ({"dimensions": True}, "'dimensions' must be a positive integer"),
        ({"dimensions": "9" * 5000}, "'dimensions' must be a positive integer"),
        ({"normalize": 1}, "'normalize' must be a boolean"),
        ({"pooling_type": "max"}, "'pooling_type' must be 'last', 'mean' or 'cls', got 'max'"),
        ({"pooling_type": ["mean"]}, "'pooling_type' must be 'last', 'mean' or 'cls'"),
        ({"task": "classify"}, "'task' must be 'embed', got 'classify'"),
    ],
)
def test_the_wrong_value_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        PoolingParams.from_mapping(values)
    assert complaint in str(refused.value) and len(str(refused.value)) < 300


def test_the_checkpoint_fills_in_what_the_client_leaves_open() -> None:
    config = PoolingConfig(pooling_type="mean", normalize=False, matryoshka_dimensions=(16, 32))
    assert PoolingParams().resolve(config, 64) == PoolingParams(pooling_type="mean", normalize=False)
    asked = PoolingParams(pooling_type="last", normalize=True, dimensions=16)
    assert asked.resolve(config, 64) == asked
    assert PoolingParams(dimensions=64).resolve(config, 64).dimensions == 64
    assert PoolingParams(dimensions=17).resolve(PoolingConfig(), 64).dimensions == 17
    with pytest.raises(InvalidRequestError, match="'dimensions' must be one of 16, 32, got '17'"):
        PoolingParams(dimensions=17).resolve(config, 64)
    with pytest.raises(InvalidRequestError, match="'dimensions' must be from 1 to 64, got '65'"):
        PoolingParams(dimensions=65).resolve(PoolingConfig(), 64)
