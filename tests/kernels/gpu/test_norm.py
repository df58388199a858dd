import pytest
import torch
from charonia_kernels import reference
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.norm import add_rms_norm, norm_config, rms_norm
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close, poison

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 64), (1, 1), (1, 576), (3, 7), (9, 33), (2, 4096), (17, 640)]


def make(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm(rows, width, dtype):
    for weight_dtype in (dtype, torch.float32):
        x, weight = make(rows, width, dtype), make(1, width, weight_dtype, seed=1)[0]
        poison(x)
        before = x.clone()
        actual = rms_norm(x, weight, 1e-5)
        assert actual.dtype == dtype
        assert torch.equal(x, before)
        assert_close(actual, reference.rms_norm(x.double(), weight.double(), 1e-5), depth=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_rms_norm(rows, width, dtype):
    for residual_dtype in (dtype, torch.float32):
        x, residual = make(rows, width, dtype), make(rows, width, residual_dtype, seed=2)
        weight = make(1, width, torch.float32, seed=1)[0]
        total = x.double() + residual.double()
        poison(x)
        actual = add_rms_norm(x, residual, weight, 1e-5)
        assert actual.dtype == dtype
        assert residual.dtype == residual_dtype
        assert_close(residual, total)
        # The norm is that of the rounded sum, which later layers see.
        assert_close(actual, reference.rms_norm(residual.double(), weight.double(), 1e-5), depth=8)


def test_the_widest_row():
    x, weight = make(1, 16384, torch.bfloat16), make(1, 16384, torch.bfloat16, seed=1)[0]
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5), depth=16)


@pytest.mark.parametrize(("start", "width"), [(20, 64), (16, 96)])
def test_strided_rows_and_untouched_surroundings(start, width):
    x, around = make(5, 200, torch.bfloat16), make(5, 200, torch.bfloat16, seed=3)
    view, residual = x[:, start : start + width], around[:, start : start + width]
    weight, before = make(1, width, torch.float32, seed=1)[0], around.clone()
    expected = reference.rms_norm(view.double(), weight.double(), 1e-6)
    assert_close(rms_norm(view, weight, 1e-6), expected, depth=8)
    add_rms_norm(view, residual, weight, 1e-6)
    assert_close(residual, before[:, start : start + width].double() + view.double())
    around[:, start : start + width] = before[:, start : start + width]
    assert torch.equal(around, before)


def test_extreme_rows():
    x = torch.tensor([[0.0] * 16, [1e-20] * 16, [1e18] * 16], device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))


def test_nan_and_infinity_are_not_hidden_and_stay_in_their_row():
    x = make(3, 100, torch.bfloat16)
    x[0, 5], x[1, 63] = float("nan"), float("inf")
    actual = rms_norm(x, torch.ones(100, device=DEVICE), 1e-6)
    assert actual[0].isnan().all()
    assert actual[1, 63].isnan()
    assert actual[2].isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    x, weight = make(40, 576, torch.bfloat16), torch.ones(576, device=DEVICE)
    whole = rms_norm(x, weight, 1e-5)
    assert torch.equal(whole[17:18], rms_norm(x[17:18], weight, 1e-5))


def test_launch_parameters():
    for width in (1, 64, 576, 1024, 4096, 5120, 16384):
        config = norm_config(width, H100)
        assert config.block >= width > config.block // 2
        assert config.block & (config.block - 1) == 0
        assert config.num_warps in (4, 8, 16)
    assert norm_config(4096, H100).num_warps == 8


def test_misfits_are_refused():
    ones = torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(make(2, 8, torch.float32), make(1, 9, torch.float32)[0], 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(make(2, 8, torch.float32), make(3, 8, torch.float32), ones, 1e-6)
    with pytest.raises(ValueError, match="gaps in the last"):
        rms_norm(make(8, 2, torch.float32).T, ones, 1e-6)
    with pytest.raises(ValueError, match=r"width 16385 is not in 1\.\.16384"):
        rms_norm(make(1, 16385, torch.float32), make(1, 16385, torch.float32)[0], 1e-6)
