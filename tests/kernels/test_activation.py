import charonia_kernels as kernels
import pytest
import torch
from charonia_kernels import reference
from support.kernel_checks import DTYPES, assert_close, poison

OPS = [(kernels.silu_mul, reference.silu_mul), (kernels.gelu_tanh_mul, reference.gelu_tanh_mul)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("op", "oracle"), OPS)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (1, 1536), (5, 77), (41, 640)])
def test_gated_activation(op, oracle, rows, width, dtype):
    x = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    poison(x[:, :width])
    actual = op(x)
    assert actual.dtype == dtype
    # The tanh form cancels: 1 + tanh(u) for u << 0 keeps few bits of what the oracle computes directly.
    assert_close(actual, oracle(x.double()), depth=32)


@pytest.mark.parametrize(("op", "oracle"), OPS)
def test_over_the_whole_range_of_the_gate(op, oracle):
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    actual, expected = op(x), oracle(x.double())
    assert_close(actual[:, :-2], expected[:, :-2], depth=32)
    assert actual[0, -2] == gate[-2]
    assert actual[0, -1] == 0.0


@pytest.mark.parametrize("op", [kernels.silu_mul, kernels.gelu_tanh_mul])
def test_a_view_of_a_wider_projection(op):
    x = torch.randn(6, 200, dtype=torch.bfloat16)
    assert torch.equal(op(x[:, 40:104]), op(x[:, 40:104].contiguous()))


@pytest.mark.parametrize("op", [kernels.silu_mul, kernels.gelu_tanh_mul])
def test_nan_is_not_hidden(op):
    x = torch.randn(2, 32)
    x[0, 3] = x[1, 20] = float("nan")
    actual = op(x)
    assert actual[0, 3].isnan()
    assert actual[1, 4].isnan()
    assert int(actual.isnan().sum()) == 2
