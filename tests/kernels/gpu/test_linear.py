from dataclasses import replace
from importlib import import_module

import pytest
import torch
from charonia_kernels.gpu import linear_choice
from charonia_kernels.gpu._launch import H100, DeviceTraits, traits
from charonia_kernels.gpu.linear_choice import choose, has_hopper_kernel
from charonia_kernels.gpu.linear_config import CUBLAS, HOPPER_SM_BYTES, LinearConfig, hopper_config, tile_rows
from charonia_kernels.gpu.linear_hopper import launch_registers
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close, poison

# The packages export functions of the same name.
ops = import_module("charonia_kernels.gpu.linear")
oracle = import_module("charonia_kernels.reference.linear")

EPS = 1e-5
SHAPES = {
    "llama8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "qwen06b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
}
VECTOR = LinearConfig("vector", block_n=4, block_k=64, prefetch=256)
SKINNY = LinearConfig("skinny", block_n=32, block_k=64, num_stages=3, prefetch=256, block_m=16)
# Every way through the kernels: whole and odd tiles, one part of the columns and several.
CONFIGS = {
    "vector": VECTOR,
    "vector-one-tile": replace(VECTOR, block_n=8, block_k=256),
    "skinny": SKINNY,
    "skinny-16": replace(SKINNY, block_n=16, block_k=128, block_m=8),
    "skinny-split": replace(SKINNY, split_k=3),
    "skinny-own-norm": replace(SKINNY, fuse_norm=False),
    "cublas": CUBLAS,
}
HOPPER = LinearConfig("hopper", block_n=64, block_k=64, num_stages=4, block_m=8, x_stages=2)
if has_hopper_kernel(traits(DEVICE)):
    CONFIGS |= {
        "hopper": HOPPER,
        "hopper-128": replace(HOPPER, block_n=128, block_k=128, num_stages=2),
        "hopper-128-8-warps": replace(HOPPER, block_n=128, num_warps=8, fuse_norm=False),
        "hopper-split": replace(HOPPER, split_k=3),
        "hopper-split-own-norm": replace(HOPPER, split_k=2, num_stages=5, x_stages=3, fuse_norm=False),
        "hopper-x-tall": replace(HOPPER, block_n=32, block_m=64, x_major=True),
        "hopper-x-tall-split": replace(
            HOPPER, block_n=16, block_m=64, x_major=True, split_k=2, fuse_norm=False
        ),
    }


def make(shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).to(DEVICE)


def rows_for(config):
    return {"vector": (1, 3), "hopper": (1, 8, 20, 61, 100)}.get(config.kind, (1, 20))


def scaled_sums(config, residual, norm_weight, weight):
    """What the configuration computes in fp64, with the roundings that it makes on the way to the products."""
    wide, gain = residual.double(), norm_weight.double()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if not config.fuse_norm:
        return (wide * inverse * gain).to(residual.dtype).double() @ weight.double().T
    scaled = wide * gain
    if config.kind in ("skinny", "hopper"):
        scaled = scaled.float().to(residual.dtype).double()
    return inverse * (scaled @ weight.double().T)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("n", "k", "with_bias"), [(32, 128, False), (38, 144, True)])
def test_linear(name, n, k, with_bias):
    config = CONFIGS[name]
    weight, bias = make((n, k), seed=1), make((n,), seed=2) if with_bias else None
    for m in rows_for(config):
        x = make((m, k))
        expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        poison(torch.empty(m, n, dtype=x.dtype, device=DEVICE))
        actual = ops.linear_with(config, x, weight, bias)
        assert actual.dtype == x.dtype
        assert_close(actual.cpu(), expected.cpu(), depth=k)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32])
def test_norm_linear(name, norm_dtype):
    config, (n, k) = CONFIGS[name], (38, 144)
    weight, bias, norm_weight = make((n, k), seed=1), make((n,), seed=2), make((k,), norm_dtype, seed=3)
    for m in rows_for(config):
        residual = make((m, k), scale=3.0)
        expected = scaled_sums(config, residual, norm_weight, weight) + bias.double()
        poison(torch.empty(m, n, dtype=residual.dtype, device=DEVICE))
        actual = ops.norm_linear_with(config, residual, norm_weight, EPS, weight, bias)
        # A row of the norm of its own may round the other way where fp32 and fp64 differ.
        slack = 2.0**13 if not config.fuse_norm else 1.0
        assert_close(actual.cpu(), expected.cpu(), depth=k * slack)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("half", [16, 19])
def test_norm_linear_silu_mul(name, half):
    config, k = CONFIGS[name], 144
    weight, norm_weight = make((2 * half, k), seed=1, scale=0.1), make((k,), seed=3)
    for m in rows_for(config):
        residual = make((m, k))
        gate, up = scaled_sums(config, residual, norm_weight, weight).chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        poison(torch.empty(m, half, dtype=residual.dtype, device=DEVICE))
        actual = ops.norm_linear_silu_mul_with(config, residual, norm_weight, EPS, weight)
        slack = 2.0**13 if not config.fuse_norm else 1.0  # cuBLAS also rounds gate and up
        assert_close(actual.cpu(), expected.cpu(), depth=k * slack)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_add(name, with_bias):
    config, (n, k) = CONFIGS[name], (38, 144)
    weight, bias = make((n, k), seed=1), make((n,), seed=2) if with_bias else None
    for m in rows_for(config):
        x, before = make((m, k)), make((m, n), seed=4, scale=8.0)
        sums = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        wide = torch.full((m + 1, n + 10), 7.0, dtype=x.dtype, device=DEVICE)
        residual = wide[:m, :n]
        residual.copy_(before)
        ops.linear_add_with(config, x, weight, residual, bias)
        slack = 2.0**12 if config.kind == "cublas" and with_bias else 1.0
        assert_close(residual.cpu(), (before.double() + sums).cpu(), depth=k * slack)
        assert (wide[m:] == 7).all()
        assert (wide[:, n:] == 7).all()


@pytest.mark.parametrize("name", ["vector", *(n for n in CONFIGS if "skinny" in n or "hopper" in n)])
def test_rows_may_lie_apart_and_others_do_not_matter(name):
    config, (n, k, m) = CONFIGS[name], (16, 128, 5)
    weight, norm_weight = make((n, k), seed=1), make((k,), seed=3)
    x = make((m, k))
    apart = torch.full((m, k + 24), float("nan"), dtype=x.dtype, device=DEVICE)[:, :k]
    apart.copy_(x)
    whole = ops.norm_linear_with(config, x, norm_weight, EPS, weight)
    assert torch.equal(ops.norm_linear_with(config, apart, norm_weight, EPS, weight), whole)
    apart[[0, 1, 3, 4]] = float("nan")
    alone = ops.norm_linear_with(config, apart, norm_weight, EPS, weight)
    assert torch.equal(alone[2], whole[2])
    assert alone[[0, 1, 3, 4]].isnan().all()


@pytest.mark.parametrize("name", [n for n in CONFIGS if "split" in n])
def test_parts_are_added_up_again_and_again(name):
    config = CONFIGS[name]
    x, weight = make((3, 192)), make((38, 192), seed=1)
    first = ops.linear_with(config, x, weight)
    for _ in range(3):
        assert torch.equal(ops.linear_with(config, x, weight), first)
    assert not ops._arrivals(x.device).any()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n in ("vector", "skinny", "hopper")])
def test_fp16(name):
    config = CONFIGS[name]
    x, weight = make((3, 192), torch.float16), make((16, 192), torch.float16, seed=1)
    actual = ops.linear_with(config, x, weight)
    assert_close(actual.cpu(), (x.double() @ weight.double().T).cpu(), depth=192)


@pytest.mark.parametrize("m", [0, 1, 6, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_public_ops_agree_with_the_oracle(m, dtype):
    k, n = 256, 16
    x, norm_weight, bias = make((m, k), dtype), make((k,), dtype, seed=3), make((n,), dtype, seed=2)
    weight = make((n, k), dtype, seed=1, scale=0.1)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ops.linear(x, weight, bias), oracle.linear(x, weight, bias), **close)
    args = (x, norm_weight, EPS, weight)
    torch.testing.assert_close(ops.norm_linear(*args, bias), oracle.norm_linear(*args, bias), **close)
    torch.testing.assert_close(ops.norm_linear_silu_mul(*args), oracle.norm_linear_silu_mul(*args), **close)
    residual = make((m, n), dtype, seed=4)
    expected = residual.clone()
    oracle.linear_add(x, weight, expected, bias)
    ops.linear_add(x, weight, residual, bias)
    torch.testing.assert_close(residual, expected, **close)


def test_a_large_gated_product_in_parts_is_the_whole(monkeypatch):
    x, norm_weight, weight = make((10, 64)), make((64,), seed=1), make((96, 64), seed=2)
    whole = ops.norm_linear_silu_mul_with(CUBLAS, x, norm_weight, EPS, weight)
    monkeypatch.setattr(ops, "LARGE_WEIGHT_BYTES", 0)
    monkeypatch.setattr(ops, "ROWS_AT_ONCE", 4)
    parts = ops.norm_linear_silu_mul_with(CUBLAS, x, norm_weight, EPS, weight)
    assert parts.shape == (10, 48)
    torch.testing.assert_close(parts, whole)
    assert ops.norm_linear_silu_mul_with(CUBLAS, x[:0], norm_weight, EPS, weight).shape == (0, 48)


def test_the_oracle_rounds_once():
    x, weight, norm_weight = make((3, 64)), make((10, 64), seed=1), make((64,), seed=3)
    wide = oracle.norm_linear(x.double(), norm_weight.double(), EPS, weight.double())
    assert_close(oracle.norm_linear(x, norm_weight, EPS, weight).cpu(), wide.cpu(), depth=64)
    gated = oracle.norm_linear_silu_mul(x.double(), norm_weight.double(), EPS, weight.double())
    gate, up = wide.chunk(2, dim=-1)
    torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up)


def test_bad_arguments():
    x, weight = make((2, 64)), make((8, 64), seed=1)
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear(x, weight[:, :32])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        ops.linear(x, weight.float())
    with pytest.raises(ValueError, match="residual"):
        ops.linear_add(x, weight, make((2, 9)))
    with pytest.raises(ValueError, match="halves"):
        ops.norm_linear_silu_mul(x, make((64,)), EPS, make((7, 64)))


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("op", ["linear", "norm_linear", "norm_linear_silu_mul", "linear_add"])
def test_choice_fits_the_device(model, op):
    small = DeviceTraits((8, 6), 84, 101_376)
    for n, k in SHAPES[model]:
        for m in (1, 2, 3, 4, 5, 8, 13, 16, 32, 33, 64, 65, 100, 128):
            for device in (H100, small):
                config = choose(m, n, k, torch.bfloat16, device, op)
                if config.kind == "vector":
                    assert m <= ops.MAX_VECTOR_ROWS
                if config.kind == "skinny":
                    assert config.shared_bytes(m, 2) < device.max_shared_bytes
                    assert config.num_stages >= 2
                    assert k // config.split_k >= config.block_k
    assert choose(1, 4096, 4096, torch.bfloat16, H100, op).kind == "vector"


def test_long_weights_go_around_the_rings():
    """Each ring is used up many times over, at the shape of a real layer."""
    n, k = 200, 4096
    weight, norm_weight = make((n, k), seed=1, scale=0.05), make((k,), seed=3)
    for config in (c for c in CONFIGS.values() if c.kind == "hopper"):
        for m in (3, 64, 128):
            x = make((m, k))
            gate, up = scaled_sums(config, x, norm_weight, weight).chunk(2, dim=-1)
            expected = torch.nn.functional.silu(gate) * up
            actual = ops.norm_linear_silu_mul_with(config, x, norm_weight, EPS, weight)
            assert_close(actual.cpu(), expected.cpu(), depth=k * 2.0**13)


def test_hopper_rings_fit_beside_those_of_the_next_kernel():
    for n, k in {shape for shapes in SHAPES.values() for shape in shapes if shape[1] % 128 == 0}:
        for m in (1, 8, 16, 17, 33, 64, 65, 128):
            for block_n, split_k, fuse_norm in (
                (64, 1, True),
                (64, 2, False),
                (128, 1, False),
                (128, 2, True),
            ):
                config = hopper_config(m, k, block_n, 64, split_k, fuse_norm=fuse_norm)
                if config is None:
                    assert k > 8192, (m, n, k)
                    continue
                block_m = tile_rows(config, m)
                rings = 128 * (config.num_stages * block_n + config.x_stages * block_m)
                assert 2 * (rings + 1024) <= HOPPER_SM_BYTES
                assert 1 <= config.x_stages <= config.num_stages
                assert rings - 128 * config.x_stages * block_m >= 4 * block_m * block_n
                registers = launch_registers(config, m, fuse_norm)
                assert registers % 8 == 0
                assert 24 < registers * (8 + 4 * fuse_norm) * 32 <= 65536


@pytest.mark.parametrize("op", ["linear", "linear_add"])
def test_hopper_kernel_is_chosen_only_where_it_runs(monkeypatch, op):
    monkeypatch.setitem(linear_choice.MEASURED, (512, 256, op), ((64, HOPPER),))
    monkeypatch.setattr(linear_choice, "INTERPRETED", False)
    pick = choose.__wrapped__
    assert pick(8, 512, 256, torch.bfloat16, H100, op) == HOPPER
    assert not pick(8, 512, 256, torch.float16, H100, op).fuse_norm
    assert pick(2, 512, 256, torch.bfloat16, H100, op, bulk=False).kind == "vector"
    assert pick(8, 512, 256, torch.bfloat16, H100, op, bulk=False) == CUBLAS
    assert pick(8, 512, 256, torch.bfloat16, DeviceTraits((10, 0), 148, 232_448), op) == CUBLAS
    monkeypatch.setattr(linear_choice, "INTERPRETED", True)
    assert pick(8, 512, 256, torch.bfloat16, H100, op) == CUBLAS


@pytest.mark.parametrize("op", ["linear", "norm_linear", "norm_linear_silu_mul", "linear_add"])
def test_defaults_for_shapes_that_nobody_measured(monkeypatch, op):
    monkeypatch.setattr(linear_choice, "INTERPRETED", False)
    pick = choose.__wrapped__
    for n, k in [
        (5120, 3072),
        (3072, 8192),
        (37888, 3584),
        (19456, 2560),
        (152064, 3584),
        (960, 576),
        (64, 28672),
    ]:
        for m in (1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128):
            config = pick(m, n, k, torch.bfloat16, H100, op)
            if m == 1 and k < 1024:
                assert config.kind == "vector"
            elif m <= 32:
                assert config.kind == "hopper"
                assert n > 64 * 132 or config.split_k > 1 or k < 1024
            elif m > 64 or (op != "norm_linear_silu_mul" and n < 100_000):
                assert config == CUBLAS
            else:
                assert config.kind == "hopper"
                assert config.block_n == (
                    128 if n in (64, 19456, 152064) or op != "norm_linear_silu_mul" else 64
                )
            if config.kind == "hopper":
                assert not config.fuse_norm or op.startswith("norm")
                registers = launch_registers(config, m, config.fuse_norm)
                assert 24 < registers * (8 + 4 * config.fuse_norm) * 32 <= 65536


def test_choice_falls_back():
    assert choose(1, 64, 4096, torch.float32, H100, "linear") == CUBLAS
    assert choose(1, 64, 100, torch.bfloat16, H100, "linear") == CUBLAS
    assert not choose(16, 4096, 4096, torch.float16, H100, "norm_linear").fuse_norm
