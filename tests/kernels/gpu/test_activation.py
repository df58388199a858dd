import pytest
import torch
from charonia_kernels import reference
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.activation import ActivationConfig, activation_config, gelu_tanh_mul, silu_mul
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close, poison

OPS = [(silu_mul, reference.silu_mul), (gelu_tanh_mul, reference.gelu_tanh_mul)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(rows, width, dtype):
    generator = torch.Generator().manual_seed(rows + width)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("op", "oracle"), OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (3, 7), (1, 1024), (5, 513), (2, 1536)])
def test_against_the_oracle(op, oracle, rows, width, dtype):
    x = make(rows, 2 * width, dtype)
    poison(x[:, :width])
    before = x.clone()
    actual = op(x)
    assert actual.dtype == dtype
    assert torch.equal(x, before)
    assert_close(actual, oracle(x.double()), depth=16, scale=4.0)


@pytest.mark.parametrize(("op", "oracle"), OPS)
def test_far_from_zero(op, oracle):
    gate = torch.tensor([-1e4, -300.0, -90.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 300.0, 1e4])
    x = torch.cat([gate, torch.ones(10)])[None].to(DEVICE)
    actual = op(x)
    assert actual.isfinite().all()
    assert_close(actual, oracle(x.double()), depth=16)


@pytest.mark.parametrize(("op", "oracle"), OPS)
def test_strided_rows(op, oracle):
    x = make(4, 300, torch.bfloat16)
    for view in (x[:, 16:272], x[:, 3:131], x[::2]):
        assert_close(op(view), oracle(view.double()), depth=16, scale=4.0)


def test_nan_stays_in_its_lane():
    x = make(2, 200, torch.bfloat16)
    x[0, 5], x[1, 163] = float("nan"), float("nan")
    assert silu_mul(x).isnan().nonzero().tolist() == [[0, 5], [1, 63]]


def test_results_do_not_depend_on_the_launch():
    x = make(3, 2 * 1056, torch.bfloat16)
    results = [silu_mul(x, config=ActivationConfig(block, 4, False)) for block in (64, 512, 2048)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][1:2], silu_mul(x[1:2]))


def test_launch_parameters():
    assert activation_config(1, 14336, H100).block == 512
    assert activation_config(8192, 14336, H100).block == 2048
    assert activation_config(8192, 100, H100).block == 128
    assert activation_config(1, 1, H100).block == 32


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"silu_mul: x \[2, 7\].* must be \[T, 2 \* I\]"):
        silu_mul(make(2, 7, torch.float32))
    with pytest.raises(ValueError, match="without gaps"):
        gelu_tanh_mul(make(8, 8, torch.float32).T)


def test_into_a_given_tensor():
    x = make(4, 2 * 96, torch.bfloat16)
    whole = torch.zeros(6, 96, dtype=torch.bfloat16, device=DEVICE)
    assert silu_mul(x, whole[1:5]).data_ptr() == whole[1:].data_ptr()
    assert torch.equal(whole[1:5], silu_mul(x))
    assert not whole[0].any() and not whole[5].any()
    for bad in (whole, whole[:4, :95], whole[:4].float()):
        with pytest.raises(ValueError, match="silu_mul: out"):
            silu_mul(x, bad)
