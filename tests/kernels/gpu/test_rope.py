import pytest
import torch
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.rope import RopeConfig, qk_norm_rope_write, rope_config
from charonia_kernels.reference.rope import qk_norm_rope_write as oracle_op
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close

BLOCK = 16
HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def case(tokens, heads, kv_heads, dim, rot, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    angles = torch.rand(97, rot // 2, generator=generator) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.randint(0, 97, (tokens,), generator=generator)
    slots = torch.randperm(BLOCK * 6, generator=generator)[:tokens] + BLOCK
    return tuple(tensor.to(DEVICE) for tensor in (qkv, positions, slots, cos_sin))


def norms_of(dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    q_norm, k_norm = torch.randn(2, dim, generator=generator)
    return q_norm.to(dtype).to(DEVICE), k_norm.to(DEVICE)


def nan_caches(kv_heads, dim, dtype, blocks=8):
    shape = (blocks, kv_heads, BLOCK, dim)
    return [torch.full(shape, float("nan"), dtype=torch.float32, device=DEVICE).to(dtype) for _ in range(2)]


def wide_results(
    qkv, positions, slots, cos_sin, heads, kv_heads, dim, norms=(None, None), scales=(None, None)
):
    keys, values = nan_caches(kv_heads, dim, torch.float64)
    norms = [None if norm is None else norm.double() for norm in norms]
    q = oracle_op(
        qkv.double(), positions, slots, cos_sin, keys, values, heads, kv_heads, dim, *norms, 1e-6, *scales
    )
    return q, keys, values


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "rot", "dtype"),
    [
        (0, 4, 2, 64, 64, torch.bfloat16),
        (1, 9, 3, 64, 64, torch.float32),
        (2, 4, 4, 80, 32, torch.bfloat16),
        (3, 5, 1, 80, 80, torch.float16),
        (5, 8, 1, 96, 96, torch.bfloat16),
        (2, 20, 2, 128, 128, torch.bfloat16),
        (2, 3, 1, 128, 64, torch.float32),
        (2, 6, 1, 256, 256, torch.float32),
    ],
)
def test_against_the_oracle(tokens, heads, kv_heads, dim, rot, with_norm, dtype):
    qkv, positions, slots, cos_sin = case(tokens, heads, kv_heads, dim, rot, dtype)
    norms = norms_of(dim, dtype) if with_norm else (None, None)
    before = qkv.clone()
    keys, values = nan_caches(kv_heads, dim, dtype)
    q = qk_norm_rope_write(
        qkv, positions, slots, cos_sin, keys, values, heads, kv_heads, dim, *norms, eps=1e-6
    )
    wide_q, wide_keys, wide_values = wide_results(qkv, positions, slots, cos_sin, heads, kv_heads, dim, norms)
    assert torch.equal(qkv, before)
    assert q.dtype == dtype
    assert_close(q, wide_q, depth=dim)
    written = ~wide_keys.isnan()
    assert int(written.sum()) == tokens * kv_heads * dim
    assert torch.equal(~keys.isnan(), written), "wrote other slots than those named"
    assert torch.equal(~values.isnan(), written), "wrote other slots than those named"
    assert_close(keys[written], wide_keys[written], depth=dim)
    assert torch.equal(values[written].double(), wide_values[written]), "values are copied, not computed"


def test_only_one_of_the_norms():
    qkv, positions, slots, cos_sin = case(2, 4, 2, 64, 64, torch.float32)
    for norms in ((norms_of(64, torch.float32)[0], None), (None, norms_of(64, torch.float32)[1])):
        keys, values = nan_caches(2, 64, torch.float32)
        q = qk_norm_rope_write(qkv, positions, slots, cos_sin, keys, values, 4, 2, 64, *norms)
        wide_q, wide_keys, _ = wide_results(qkv, positions, slots, cos_sin, 4, 2, 64, norms)
        assert_close(q, wide_q, depth=64)
        assert_close(keys[~wide_keys.isnan()], wide_keys[~wide_keys.isnan()], depth=64)


def test_int32_indices():
    qkv, positions, slots, cos_sin = case(3, 4, 2, 64, 64, torch.bfloat16)
    caches, expected = nan_caches(2, 64, torch.bfloat16), nan_caches(2, 64, torch.bfloat16)
    q = qk_norm_rope_write(qkv, positions.int(), slots.int(), cos_sin, *caches, 4, 2, 64)
    assert torch.equal(q, qk_norm_rope_write(qkv, positions, slots, cos_sin, *expected, 4, 2, 64))
    for actual, other in zip(caches, expected, strict=True):
        assert torch.equal(actual.nan_to_num(7.0), other.nan_to_num(7.0))


def test_padding_goes_to_the_null_block_only():
    qkv, positions, _, cos_sin = case(4, 2, 2, 64, 64, torch.float32)
    keys, values = nan_caches(2, 64, torch.float32)
    slots = torch.tensor([17, 0, 0, 3], device=DEVICE)
    qk_norm_rope_write(qkv, positions, slots, cos_sin, keys, values, 2, 2, 64)
    assert (~keys.isnan()).any(dim=-1).nonzero()[:, 0].unique().tolist() == [0, 1]
    assert keys[0, :, [0, 3]].isfinite().all()
    assert int(values.isfinite().sum()) == 3 * 2 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_caches(dtype, scaled):
    if not HAS_FP8:
        pytest.skip("no fp8 on this device")
    qkv, positions, slots, cos_sin = case(4, 4, 2, 64, 64, dtype)
    qkv[0], qkv[1] = qkv[0] * 1e4, qkv[1] * 1e-3
    scales = (None, None)
    if scaled:
        scales = torch.tensor([0.37], device=DEVICE), torch.tensor(1.9, device=DEVICE)
    keys, values = nan_caches(2, 64, torch.float8_e4m3fn)
    q = qk_norm_rope_write(
        qkv, positions, slots, cos_sin, keys, values, 4, 2, 64, k_scale=scales[0], v_scale=scales[1]
    )
    wide_q, wide_keys, wide_values = wide_results(qkv, positions, slots, cos_sin, 4, 2, 64, scales=scales)
    assert_close(q, wide_q, depth=4, scale=1e4)
    for stored, wide in ((keys, wide_keys), (values, wide_values)):
        written = ~wide.isnan()
        assert torch.equal(~stored.float().isnan(), written)
        actual, expected = stored.double()[written], wide[written].clamp(-448, 448)
        # Half a unit: 2**-4 relative, 2**-10 below the smallest normal number; and what fp32 adds to the exact value.
        allowed = (expected.abs() * 2**-4).clamp(min=2**-10) * 1.001
        assert bool(((actual - expected).abs() <= allowed).all())
        assert actual.abs().max() == 448
    # k and v as fp32 are the oracle's to the bit here but for k's rotation.
    oracle = nan_caches(2, 64, torch.float8_e4m3fn)
    oracle_op(qkv, positions, slots, cos_sin, *oracle, 4, 2, 64, k_scale=scales[0], v_scale=scales[1])
    assert torch.equal(oracle[1].float().nan_to_num(7.0), values.float().nan_to_num(7.0))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_caches_of_another_dtype(dtype, cache_dtype):
    qkv, positions, slots, cos_sin = case(3, 4, 2, 64, 64, dtype)
    caches = nan_caches(2, 64, cache_dtype)
    qk_norm_rope_write(qkv, positions, slots, cos_sin, *caches, 4, 2, 64)
    _, *wide = wide_results(qkv, positions, slots, cos_sin, 4, 2, 64)
    for actual, expected in zip(caches, wide, strict=True):
        assert_close(actual[~expected.isnan()], expected[~expected.isnan()])


def test_a_layer_of_a_larger_cache_and_a_slice_of_a_wider_projection():
    qkv, positions, slots, cos_sin = case(3, 4, 2, 64, 64, torch.bfloat16)
    wide = torch.cat([qkv, qkv], dim=1)[:, : qkv.shape[1]]
    layers = torch.full((8, 3, 2, 2, BLOCK, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    plain = nan_caches(2, 64, torch.bfloat16)
    q = qk_norm_rope_write(wide, positions, slots, cos_sin, layers[:, 1, 0], layers[:, 1, 1], 4, 2, 64)
    assert torch.equal(q, qk_norm_rope_write(qkv, positions, slots, cos_sin, *plain, 4, 2, 64))
    assert torch.equal(layers[:, 1, 0].nan_to_num(7.0), plain[0].nan_to_num(7.0))
    assert torch.equal(layers[:, 1, 1].nan_to_num(7.0), plain[1].nan_to_num(7.0))
    assert layers[:, [0, 2]].isnan().all()


def test_a_token_does_not_depend_on_its_batch():
    qkv, positions, slots, cos_sin = case(9, 5, 2, 64, 64, torch.bfloat16)
    norms = norms_of(64, torch.bfloat16)
    keys, values = nan_caches(2, 64, torch.bfloat16)
    whole = qk_norm_rope_write(qkv, positions, slots, cos_sin, keys, values, 5, 2, 64, *norms)
    one = slice(4, 5)
    alone, _ = caches = nan_caches(2, 64, torch.bfloat16)
    q = qk_norm_rope_write(qkv[one], positions[one], slots[one], cos_sin, *caches, 5, 2, 64, *norms)
    assert torch.equal(q, whole[one])
    assert torch.equal(alone[~alone.isnan()], keys[~alone.isnan()])


def test_groups_of_any_size_give_the_same():
    qkv, positions, slots, cos_sin = case(2, 5, 3, 64, 64, torch.float32)
    results = []
    for heads in (1, 2, 8):
        caches = nan_caches(3, 64, torch.float32)
        config = RopeConfig(heads, 4, False)
        q = qk_norm_rope_write(qkv, positions, slots, cos_sin, *caches, 5, 3, 64, config=config)
        results.append([q, *(cache.nan_to_num(7.0) for cache in caches)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_launch_parameters():
    assert rope_config(32, 8, 128, H100).heads == 8
    assert rope_config(16, 8, 64, H100).heads == 16
    assert rope_config(3, 1, 80, H100).heads == 4
    assert rope_config(1, 1, 256, H100).heads == 1
    assert rope_config(8, 4, 256, H100).heads == 4
    assert rope_config(1, 1, 64, H100).num_warps == 1


def test_misfits_are_refused():
    qkv, positions, slots, cos_sin = case(5, 4, 2, 64, 64, torch.float32)
    caches = nan_caches(2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"slot_mapping \[4\] must be \[5\]"):
        qk_norm_rope_write(qkv, positions, slots[:4], cos_sin, *caches, 4, 2, 64)
    with pytest.raises(ValueError, match="does not fit 6 query and 2 KV heads of 64"):
        qk_norm_rope_write(qkv, positions, slots, cos_sin, *caches, 6, 2, 64)
    with pytest.raises(ValueError, match=r"cos_sin_cache .* must be fp32"):
        qk_norm_rope_write(qkv, positions, slots, cos_sin.half(), *caches, 4, 2, 64)
    with pytest.raises(ValueError, match=r"key_cache \[8, 1, 16, 64\]"):
        qk_norm_rope_write(qkv, positions, slots, cos_sin, *nan_caches(1, 64, torch.float32), 4, 2, 64)
    with pytest.raises(ValueError, match="differ in shape or strides"):
        qk_norm_rope_write(qkv, positions, slots, cos_sin, caches[0], caches[1][:4], 4, 2, 64)
    assert all(cache.isnan().all() for cache in caches)
