import charonia_kernels as kernels
import pytest
import torch
from charonia_kernels import reference
from support.kernel_checks import DTYPES, assert_close

BLOCK = 16


def case(tokens, heads, kv_heads, dim, rot, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    angles = torch.rand(97, rot // 2, generator=generator) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.randint(0, 97, (tokens,), generator=generator)
    slots = torch.randperm(BLOCK * 6, generator=generator)[:tokens] + BLOCK
    return qkv, positions, slots, cos_sin


def nan_caches(kv_heads, dim, dtype, blocks=8):
    return [torch.full((blocks, kv_heads, BLOCK, dim), float("nan"), dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "rot"),
    [
        (0, 4, 2, 64, 64),
        (1, 9, 3, 64, 64),
        (5, 4, 4, 80, 32),
        (33, 8, 1, 96, 96),
        (7, 8, 2, 128, 128),
        (3, 4, 1, 256, 256),
    ],
)
def test_against_the_oracle(tokens, heads, kv_heads, dim, rot, with_norm, dtype):
    qkv, positions, slots, cos_sin = case(tokens, heads, kv_heads, dim, rot, dtype)
    norms = [torch.randn(dim).to(dtype), torch.randn(dim)] if with_norm else [None, None]
    before = qkv.clone()
    keys, values = nan_caches(kv_heads, dim, dtype)
    wide_keys, wide_values = nan_caches(kv_heads, dim, torch.float64)
    q = kernels.qk_norm_rope_write(
        qkv, positions, slots, cos_sin, keys, values, heads, kv_heads, dim, *norms, eps=1e-6
    )
    wide_norms = [None if norm is None else norm.double() for norm in norms]
    wide_q = reference.qk_norm_rope_write(
        qkv.double(),
        positions,
        slots,
        cos_sin,
        wide_keys,
        wide_values,
        heads,
        kv_heads,
        dim,
        *wide_norms,
        eps=1e-6,
    )
    assert torch.equal(qkv, before)
    assert q.dtype == dtype
    assert_close(q, wide_q, depth=dim)
    written = ~wide_keys.isnan()
    assert int(written.sum()) == tokens * kv_heads * dim
    assert torch.equal(~keys.isnan(), written), "wrote other slots than those named"
    assert torch.equal(~values.isnan(), written), "wrote other slots than those named"
    assert_close(keys[written], wide_keys[written], depth=dim)
    assert torch.equal(values[written].double(), wide_values[written]), "values are copied, not computed"


def test_the_rotation_is_a_rotation():
    """Independent of the oracle: complex multiplication of lanes i and i + rot / 2."""
    qkv, positions, slots, cos_sin = case(6, 2, 1, 32, 16, torch.float32)
    q = kernels.qk_norm_rope_write(
        qkv, positions, slots, cos_sin, *nan_caches(1, 32, torch.float32), 2, 1, 32
    )
    x = qkv.view(6, 4, 32)[:, :2].double()
    turn = torch.complex(cos_sin[positions, :8], cos_sin[positions, 8:]).to(torch.complex128)[:, None]
    expected = torch.complex(x[..., :8], x[..., 8:16]) * turn
    assert_close(q, torch.cat([expected.real, expected.imag, x[..., 16:]], dim=-1))


def test_padding_goes_to_the_null_block_only():
    qkv, positions, slots, cos_sin = case(4, 2, 2, 64, 64, torch.float32)
    keys, values = nan_caches(2, 64, torch.float32)
    slots = torch.tensor([17, 0, 0, 3])
    kernels.qk_norm_rope_write(qkv, positions, slots, cos_sin, keys, values, 2, 2, 64)
    assert torch.equal((~keys.isnan()).any(dim=-1).nonzero()[:, 0].unique(), torch.tensor([0, 1]))
    assert keys[0, :, [0, 3]].isfinite().all()
    assert keys[1, :, 1].isfinite().all()
    assert int(values.isfinite().sum()) == 3 * 2 * 64


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_caches_of_another_dtype(dtype, cache_dtype):
    qkv, positions, slots, cos_sin = case(5, 4, 2, 64, 64, dtype)
    caches, wide = nan_caches(2, 64, cache_dtype), nan_caches(2, 64, torch.float64)
    kernels.qk_norm_rope_write(qkv, positions, slots, cos_sin, *caches, 4, 2, 64)
    reference.qk_norm_rope_write(qkv.double(), positions, slots, cos_sin, *wide, 4, 2, 64)
    for actual, expected in zip(caches, wide, strict=True):
        assert_close(actual[~expected.isnan()], expected[~expected.isnan()])


def test_a_layer_of_a_larger_cache_and_a_slice_of_a_wider_projection():
    qkv, positions, slots, cos_sin = case(5, 4, 2, 64, 64, torch.bfloat16)
    wide = torch.cat([qkv, qkv], dim=1)[:, : qkv.shape[1]]
    layers = torch.full((8, 3, 2, 2, BLOCK, 64), float("nan"), dtype=torch.bfloat16)  # blocks first
    plain = nan_caches(2, 64, torch.bfloat16)
    q = kernels.qk_norm_rope_write(
        wide, positions, slots, cos_sin, layers[:, 1, 0], layers[:, 1, 1], 4, 2, 64
    )
    expected = kernels.qk_norm_rope_write(qkv, positions, slots, cos_sin, *plain, 4, 2, 64)
    assert torch.equal(q, expected)
    assert torch.equal(layers[:, 1, 0].nan_to_num(7.0), plain[0].nan_to_num(7.0))
    assert layers[:, [0, 2]].isnan().all()


def test_misfits_are_refused():
    qkv, positions, slots, cos_sin = case(5, 4, 2, 64, 64, torch.float32)
    caches = nan_caches(2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"slot_mapping .* torch.int32 must be"):
        kernels.qk_norm_rope_write(qkv, positions, slots.int(), cos_sin, *caches, 4, 2, 64)
    with pytest.raises(ValueError, match="do not fit 6 query and 2 KV heads of 64"):
        kernels.qk_norm_rope_write(qkv, positions, slots, cos_sin, *caches, 6, 2, 64)
    assert all(cache.isnan().all() for cache in caches)
