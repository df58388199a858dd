import charonia_kernels as kernels
import pytest
import torch
from charonia_kernels import reference
from support.kernel_checks import DTYPES, assert_close, poison

SHAPES = [(0, 64), (1, 1), (1, 576), (3, 7), (8, 576), (9, 33), (17, 1024), (130, 577)]


def make(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm(rows, width, dtype, weight_dtype):
    x, weight = make(rows, width, dtype), make(1, width, weight_dtype, seed=1)[0]
    poison(x)
    before = x.clone()
    actual = kernels.rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    assert torch.equal(x, before)
    assert_close(actual, reference.rms_norm(x.double(), weight.double(), 1e-5), depth=8)


def test_rms_norm_of_a_strided_view():
    x = make(5, 100, torch.bfloat16)
    view = x[:, 20:84]
    weight = make(1, 64, torch.float32, seed=1)[0]
    assert_close(
        kernels.rms_norm(view, weight, 1e-6), reference.rms_norm(view.double(), weight.double(), 1e-6)
    )


def test_rms_norm_of_extreme_rows():
    x = torch.tensor([[0.0] * 16, [1e-20] * 16, [1e18] * 16])
    weight = torch.ones(16)
    assert_close(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_hidden(dtype):
    x = make(3, 64, dtype)
    x[0, 5], x[1, 63] = float("nan"), float("inf")
    actual = kernels.rms_norm(x, torch.ones(64), 1e-6)
    assert actual[0].isnan().all()
    assert actual[1, 63].isnan()
    assert actual[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_rms_norm(rows, width, dtype, residual_dtype):
    x, residual = make(rows, width, dtype), make(rows, width, residual_dtype, seed=2)
    weight = make(1, width, torch.float32, seed=1)[0]
    total = x.double() + residual.double()
    poison(x)
    actual = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert actual.dtype == dtype
    assert residual.dtype == residual_dtype
    assert_close(residual, total)
    # The norm is that of the rounded sum, which later layers see.
    assert_close(actual, reference.rms_norm(residual.double(), weight.double(), 1e-5), depth=8)


def test_half_precision_falls_back_to_the_reference():
    x, weight = make(4, 48, torch.float16), torch.ones(48, dtype=torch.float16)
    actual = kernels.rms_norm(x, weight, 1e-5)
    assert actual.dtype == torch.float16
    assert_close(actual, reference.rms_norm(x.double(), weight.double(), 1e-5), depth=8)


def test_a_row_does_not_depend_on_its_batch():
    x, weight = make(300, 576, torch.bfloat16), torch.ones(576)
    whole = kernels.rms_norm(x, weight, 1e-5)
    assert torch.equal(whole[17:18], kernels.rms_norm(x[17:18], weight, 1e-5))


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        kernels.rms_norm(torch.randn(2, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.add_rms_norm(torch.randn(2, 8), torch.randn(3, 8), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="gaps in the last dimension"):
        kernels.rms_norm(torch.randn(8, 2).T, torch.ones(8), 1e-6)
