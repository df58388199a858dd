import charonia_kernels as kernels
import pytest
import torch
from charonia_kernels.cpu.linear import plan_linear
from support.kernel_checks import DTYPES, assert_close, poison


def make(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [
        *((rows, 50, 70) for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        *((rows, columns, depth) for rows in (1, 3, 9) for columns in (1, 2, 7) for depth in (1, 7, 8, 9)),
        (1, 960, 576),
        (7, 577, 1537),
        (33, 199, 300),
        (130, 64, 96),
        (4, 3, 0),
    ],
)
def test_linear(rows, columns, depth, dtype, with_bias):
    x, weight = make((rows, depth), dtype, 0), make((columns, depth), dtype, 1)
    bias = make((columns,), dtype, 2) if with_bias else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    poison(torch.empty(rows, columns, dtype=dtype))
    actual = kernels.linear(x, weight, bias)
    assert actual.dtype == dtype
    assert_close(actual, expected, depth=max(4, depth))


def test_bf16_weights_under_fp32_activations():
    x, weight = make((5, 100), torch.float32, 0), make((30, 100), torch.bfloat16, 1)
    actual = kernels.linear(x, weight)
    assert actual.dtype == torch.float32
    assert_close(actual, x.double() @ weight.double().T, depth=100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_how_many_it_comes_with(dtype):
    x, weight = make((16, 583), dtype, 0), make((211, 583), dtype, 1)
    alone = torch.cat([kernels.linear(x[i : i + 1], weight) for i in range(16)])
    for rows in range(1, 17):
        assert torch.equal(kernels.linear(x[:rows], weight), alone[:rows]), rows


def test_nan_and_infinity_are_not_hidden():
    x, weight = make((2, 40), torch.float32, 0), make((6, 40), torch.float32, 1)
    weight[1, 39], weight[2, 3] = float("nan"), float("inf")
    actual = kernels.linear(x, weight)
    assert actual[:, 1].isnan().all()
    assert actual[:, 2].isinf().all()
    assert int(actual.isfinite().sum()) == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_as_what_they_show(dtype):
    wide, weight = make((6, 90), dtype, 0), make((40, 20), dtype, 1)
    assert torch.equal(
        kernels.linear(wide[:, 7:27], weight), kernels.linear(wide[:, 7:27].contiguous(), weight)
    )
    turned = make((20, 40), dtype, 1).T
    assert torch.equal(
        kernels.linear(wide[:, :20], turned), kernels.linear(wide[:, :20], turned.contiguous())
    )


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x is \[2, 8\], weight \[3, 9\]"):
        kernels.linear(torch.randn(2, 8), torch.randn(3, 9))


@pytest.mark.parametrize("rows", [1, 4, 64, 2048])
@pytest.mark.parametrize("columns", [1, 64, 576, 49152])
@pytest.mark.parametrize("depth", [1, 576, 14336])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_plans_cover_the_weight_and_use_the_threads_where_it_pays(rows, columns, depth, threads):
    plan = plan_linear(rows, columns, depth, torch.bfloat16, threads, native_bf16=False)
    items = -(-columns // plan.columns_per_item)
    assert not plan.use_torch
    assert 1 <= plan.threads <= threads
    assert items * plan.columns_per_item >= columns
    assert plan.columns_per_item % 12 == 0
    if columns >= 49152 and depth >= 576:
        assert plan.threads == threads
        assert items >= 2 * threads
    if rows * columns * depth < 1000:
        assert plan.threads == 1


def test_native_bf16_matmul_takes_many_rows_only():
    def plans(rows, dtype):
        return plan_linear(rows, 576, 576, dtype, 8, native_bf16=True).use_torch

    assert plans(256, torch.bfloat16)
    assert not plans(1, torch.bfloat16)
    assert not plans(256, torch.float32)
