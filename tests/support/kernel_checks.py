"""Comparison of a kernel's result with an fp64 oracle."""

import torch

DTYPES = (torch.float32, torch.bfloat16)
# Half a unit in the last place, relative: what rounding the result once may cost.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, depth: int = 4, scale: float = 1.0) -> None:
    """Fail unless `actual` is `expected` up to one rounding and the error of `depth` fp32 operations.

    `scale` is the size of what they add up; `expected` is the fp64 oracle's. The message names the worst element.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.dtype == torch.float64
    if actual.numel() == 0:
        return
    unit = 2**-24 if actual.dtype != torch.float64 else 2**-53
    tolerance = 1.01 * ROUNDING[actual.dtype] * expected.abs() + unit * depth * (scale + expected.abs())
    error = (actual.double() - expected).abs()
    error = torch.where(actual.double() == expected, 0.0, error)  # infinities
    ratio = (error / tolerance).nan_to_num(nan=float("inf"))
    worst = int(ratio.argmax())
    if ratio.flatten()[worst] > 1:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
        rms = float(error.square().mean().sqrt())
        raise AssertionError(
            f"worst element {place}: {actual[place].item()!r}, expected {expected[place].item()!r}, "
            f"error {error[place].item():.3e} of {tolerance[place].item():.3e} allowed; "
            f"max error {error.max().item():.3e}, rms {rms:.3e}, "
            f"{int((ratio > 1).sum())} of {ratio.numel()} elements off"
        )


def poison(*tensors: torch.Tensor) -> None:
    """Leave NaN in freshly freed memory of these sizes, where the next outputs are likely to be allocated."""
    for tensor in tensors:
        torch.full_like(tensor, float("nan"))
