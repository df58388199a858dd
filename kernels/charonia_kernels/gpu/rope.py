"""What lies between the QKV projection and attention, on the GPU: per-head norm, rotary embedding, KV write.

One program handles a group of heads of one kind (queries, keys or values) of one token:

    group   0 .. Q_GROUPS - 1    Q_GROUPS .. Q_GROUPS + KV_GROUPS - 1    .. GROUPS - 1
    kind    queries -> out       keys -> key_cache                       values -> value_cache

Positions and slots were written before the step's fence (`_launch.py`): they, and the angles that the positions select,
are read while the projection still runs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from charonia_kernels.gpu._launch import DeviceTraits, gdc_launch_dependents, gdc_wait, traits


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """heads: heads of a program, a power of two."""

    heads: int
    num_warps: int
    use_pdl: bool


def rope_config(num_heads: int, num_kv_heads: int, head_dim: int, device: DeviceTraits) -> RopeConfig:
    """Launch parameters, of the model alone: a token's result does not depend on the tokens around it.

    1024 lanes a program, eight a thread: 16 bytes of bf16.
    """
    width = triton.next_power_of_2(head_dim)
    heads = min(max(1024 // width, 1), triton.next_power_of_2(max(num_heads, num_kv_heads)))
    return RopeConfig(heads, max(heads * width // 256, 1), device.has_pdl)


@triton.jit
def _encode(x, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x / scale`` in the cache's dtype; fp8 saturates at its largest number, and NaN stays NaN."""
    if scale is not None:
        x = tl.div_rn(x, tl.load(scale))
    if dtype == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _norm_rotate(  # type: ignore[no-untyped-def]
    row,
    heads,
    own,
    weight,
    token_position,
    cos_sin,
    eps,
    HEAD_DIM: tl.constexpr,
    ROT: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Heads ``row + heads * HEAD_DIM`` where `own`, normalised if there is a weight, rotated: fp32 [HEADS, BLOCK].

    Calls `gdc_wait`, after loading the weights and the angles.
    """
    HALF: tl.constexpr = ROT // 2
    # Everything is loaded as a whole tile, though all heads share weights and angles: loads of one row would get
    # another layout, and the tile would pass through shared memory to meet it.
    inside = own & (tl.arange(0, BLOCK)[None, :] < HEAD_DIM)
    lanes = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], inside.shape)
    low = lanes < HALF
    turns = inside & (lanes < ROT)
    # Lane i turns with lane i + HALF.
    partner = tl.where(low, lanes + HALF, lanes - HALF)
    if weight is not None:
        gain = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        partner_gain = tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)
    position = tl.load(token_position, cache_modifier=".cg").to(tl.int64)
    angles = cos_sin + position * ROT + tl.where(low, lanes, lanes - HALF)
    cos = tl.load(angles, mask=turns, other=1.0)
    sin = tl.load(angles + HALF, mask=turns, other=0.0)
    gdc_wait(USE_PDL)
    first = row + heads * HEAD_DIM
    x = tl.load(first + lanes, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(first + partner, mask=turns, other=0.0).to(tl.float32)
    if weight is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = x * inverse * gain
        y = y * inverse * partner_gain
    return x * cos + y * tl.where(low, -sin, sin)


@triton.jit
def _slot_offset(token_slot, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.load(token_slot, cache_modifier=".cg").to(tl.int64)
    return slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride


@triton.jit
def qk_norm_rope_write_kernel(  # type: ignore[no-untyped-def]
    # pointers; the weights and scales may be None
    qkv,
    positions,
    slot_mapping,
    cos_sin,
    key_cache,
    value_cache,
    out,
    q_weight,
    k_weight,
    k_scale,
    v_scale,
    # scalars
    qkv_stride,
    block_stride,
    head_stride,
    slot_stride,
    eps,
    # constants
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One group of heads of a token. out [T, NUM_HEADS, HEAD_DIM] and cos_sin [P, ROT] contiguous."""
    gdc_launch_dependents(USE_PDL)
    Q_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = Q_GROUPS + 2 * KV_GROUPS
    program = tl.program_id(0)
    token = (program // GROUPS).to(tl.int64)
    group = program % GROUPS
    row = qkv + token * qkv_stride
    lanes = tl.arange(0, BLOCK)[None, :]
    if group < Q_GROUPS:
        heads = group * HEADS + tl.arange(0, HEADS)[:, None]
        own = heads < NUM_HEADS
        q = _norm_rotate(
            row, heads, own, q_weight, positions + token, cos_sin, eps, HEAD_DIM, ROT, BLOCK, USE_PDL
        )
        q_place = out + (token * NUM_HEADS + heads) * HEAD_DIM + lanes
        tl.store(q_place, q.to(out.dtype.element_ty), mask=own & (lanes < HEAD_DIM))
    else:
        heads = (group - Q_GROUPS) % KV_GROUPS * HEADS + tl.arange(0, HEADS)[:, None]
        own = heads < NUM_KV_HEADS
        inside = own & (lanes < HEAD_DIM)
        place = _slot_offset(slot_mapping + token, block_stride, slot_stride, BLOCK_SIZE)
        place += heads * head_stride + lanes
        if group < Q_GROUPS + KV_GROUPS:
            keys = row + NUM_HEADS * HEAD_DIM
            k = _norm_rotate(
                keys, heads, own, k_weight, positions + token, cos_sin, eps, HEAD_DIM, ROT, BLOCK, USE_PDL
            )
            tl.store(key_cache + place, _encode(k, k_scale, key_cache.dtype.element_ty), mask=inside)
        else:
            gdc_wait(USE_PDL)
            values = row + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
            v = tl.load(values + heads * HEAD_DIM + lanes, mask=inside, other=0.0).to(tl.float32)
            tl.store(value_cache + place, _encode(v, v_scale, value_cache.dtype.element_ty), mask=inside)


def _check(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    heads: tuple[int, int, int],
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    tokens, rot = qkv.shape[0], cos_sin_cache.shape[1]
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or qkv.stride(1) != 1:
        raise ValueError(
            f"qk_norm_rope_write: qkv {list(qkv.shape)}, strides {qkv.stride()}, does not fit {num_heads} query and "
            f"{num_kv_heads} KV heads of {head_dim}"
        )
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        if tensor.shape != (tokens,) or tensor.stride(0) != 1:
            raise ValueError(
                f"qk_norm_rope_write: {name} {list(tensor.shape)} must be [{tokens}], contiguous"
            )
    if cos_sin_cache.dtype != torch.float32 or not cos_sin_cache.is_contiguous() or rot > head_dim or rot % 2:
        raise ValueError(
            f"qk_norm_rope_write: cos_sin_cache {list(cos_sin_cache.shape)} {cos_sin_cache.dtype} must be fp32, "
            f"contiguous, of even width up to {head_dim}"
        )
    if key_cache.shape[1] != num_kv_heads or key_cache.shape[3] != head_dim or key_cache.stride(3) != 1:
        raise ValueError(
            f"qk_norm_rope_write: key_cache {list(key_cache.shape)}, strides {key_cache.stride()}, must be "
            f"[num_blocks, {num_kv_heads}, block_size, {head_dim}] without gaps in heads"
        )
    if key_cache.shape != value_cache.shape or key_cache.stride() != value_cache.stride():
        raise ValueError("qk_norm_rope_write: key_cache and value_cache differ in shape or strides")


def qk_norm_rope_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    config: RopeConfig | None = None,
) -> torch.Tensor:
    """Normalise, rotate, store k and v, return q; see :func:`charonia_kernels.reference.qk_norm_rope_write`.

    Args:
        qkv: ``[T, (num_heads + 2 * num_kv_heads) * head_dim]``, fp32, bf16 or fp16; rows may be strided.
        positions: ``[T]`` int64 or int32, contiguous; complete before the kernel in front starts, as is what lies
            before a step's fence (`_launch.py`).
        slot_mapping: ``[T]`` int64 or int32, contiguous, each >= 0; complete as early.
        cos_sin_cache: ``[P, rot]`` fp32, contiguous.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]`` in fp32, bf16, fp16 or fp8 e4m3 (from compute
            capability 8.9 on), last dimension contiguous.
        value_cache: as ``key_cache``, with the same strides.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: D.
        q_norm_weight: ``[head_dim]``, contiguous, or None.
        k_norm_weight: ``[head_dim]``, contiguous, or None.
        eps: of both norms.
        k_scale: one fp32 element, or None for 1.
        v_scale: one fp32 element, or None for 1.
        config: launch parameters; by default :func:`rope_config`'s.

    Returns:
        q, ``[T, num_heads, head_dim]`` in qkv's dtype. A token depends on its own inputs alone, to the bit.

    Raises:
        ValueError: a shape, dtype or stride is not as described.
    """
    heads = (num_heads, num_kv_heads, head_dim)
    _check(qkv, positions, slot_mapping, cos_sin_cache, key_cache, value_cache, heads)
    tokens = qkv.shape[0]
    out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    if config is None:
        config = rope_config(num_heads, num_kv_heads, head_dim, traits(qkv.device))
    groups = triton.cdiv(num_heads, config.heads) + 2 * triton.cdiv(num_kv_heads, config.heads)
    qk_norm_rope_write_kernel[(tokens * groups,)](
        qkv,
        positions,
        slot_mapping,
        cos_sin_cache,
        key_cache,
        value_cache,
        out,
        q_norm_weight,
        k_norm_weight,
        k_scale,
        v_scale,
        qkv.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROT=cos_sin_cache.shape[1],
        BLOCK_SIZE=key_cache.shape[2],
        HEADS=config.heads,
        BLOCK=triton.next_power_of_2(head_dim),
        USE_PDL=config.use_pdl,
        num_warps=config.num_warps,
        launch_pdl=config.use_pdl,
    )
    return out
