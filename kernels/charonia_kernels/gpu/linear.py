"""Linear layers, alone and with what stands before and after them in a transformer.

Up to some rows of x a layer is bound by the stream of its weight. There kernels of our own run (`linear_vector`,
`linear_skinny`, `linear_hopper`); they take the RMSNorm in front, SiLU(gate) * up behind, or the residual's sum along.
The norm costs no pass of its own: ``rms_norm(r) @ W.T = rsqrt(mean(r**2) + eps) * ((r * g) @ W.T)``, and the mean
gathers while r streams by. Elsewhere PyTorch's matmul runs between kernels for the rest. `linear_choice.choose`
decides.

x ``[M, K]``, weight ``[N, K]``, bias ``[N]``: of one dtype; sums are fp32. A row's result depends on its own values and
on M, never on other rows, and is the same each time. The kernels share a counter per device: one stream at a time.
"""

from functools import cache

import torch
import torch.nn.functional as F

from charonia_kernels.gpu import linear_hopper
from charonia_kernels.gpu._launch import traits
from charonia_kernels.gpu.activation import silu_mul
from charonia_kernels.gpu.linear_choice import choose
from charonia_kernels.gpu.linear_config import (
    CUBLAS,
    MAX_SKINNY_ROWS,
    MAX_VECTOR_ROWS,
    LinearConfig,
    Op,
    tile_rows,
)
from charonia_kernels.gpu.linear_skinny import skinny_kernel
from charonia_kernels.gpu.linear_vector import vector_kernel
from charonia_kernels.gpu.norm import rms_norm

MAX_SPLIT_TILES = 16384
ROWS_AT_ONCE = 2048
LARGE_WEIGHT_BYTES = 64 << 20
"""Of weights beyond the L2 cache a gated product is taken so many rows at a time. It takes as long, and what stands
between product and activation takes a quarter of the memory for 8,192 rows, which goes to the KV cache instead.
"""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, ``[M, N]``."""
    return linear_with(_config(x, weight, "linear"), x, weight, bias)


def norm_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear(rms_norm(residual), weight, bias)``, ``[M, N]``; norm_weight ``[K]``, of any floating-point dtype."""
    config = _config(residual, weight, "norm_linear")
    return norm_linear_with(config, residual, norm_weight, eps, weight, bias)


def norm_linear_silu_mul(
    residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """``silu_mul(norm_linear(residual))``, ``[M, N // 2]``; the rows of the gate are the first half of the weight's."""
    config = _config(residual, weight, "norm_linear_silu_mul")
    return norm_linear_silu_mul_with(config, residual, norm_weight, eps, weight)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``residual += linear(x, weight, bias)`` in place, rounded once (a bias off our own kernels: twice)."""
    if residual.shape != (x.shape[0], weight.shape[0]) or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {list(residual.shape)} {residual.dtype} does not fit x and weight, "
            f"{[x.shape[0], weight.shape[0]]} {x.dtype}"
        )
    config = _config(x, weight, "linear_add") if residual.stride(1) == 1 else CUBLAS
    linear_add_with(config, x, weight, residual, bias)


def linear_with(
    config: LinearConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """`linear` as the configuration says. `pdl` allows programmatic dependent launch."""
    if config.kind == "cublas":
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    _launch(config, x, weight, out, bias=bias, pdl=pdl)
    return out


def norm_linear_with(
    config: LinearConfig,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """`norm_linear` as the configuration says."""
    if not config.fuse_norm:
        return linear_with(config, rms_norm(residual, norm_weight, eps), weight, bias, pdl=pdl)
    out = residual.new_empty(residual.shape[0], weight.shape[0])
    _launch(config, residual, weight, out, bias=bias, norm_weight=norm_weight, eps=eps, pdl=pdl)
    return out


def norm_linear_silu_mul_with(
    config: LinearConfig,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """`norm_linear_silu_mul` as the configuration says."""
    if weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows, which are no two halves")
    x = residual if config.fuse_norm else rms_norm(residual, norm_weight, eps)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    if config.kind == "cublas":
        at_once = ROWS_AT_ONCE if weight.nbytes > LARGE_WEIGHT_BYTES else max(1, len(x))
        for rows, result in zip(torch.split(x, at_once), torch.split(out, at_once), strict=True):
            silu_mul(F.linear(rows, weight), result)
        return out
    fused_norm = norm_weight if config.fuse_norm else None
    _launch(config, x, weight, out, norm_weight=fused_norm, eps=eps, gated=True, pdl=pdl)
    return out


def linear_add_with(
    config: LinearConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = True,
) -> None:
    """`linear_add` as the configuration says."""
    if config.kind == "cublas":
        if bias is not None:
            residual.add_(bias)
        torch.addmm(residual, x, weight.t(), out=residual)
        return
    _launch(config, x, weight, residual, bias=bias, add=True, pdl=pdl)


def _config(x: torch.Tensor, weight: torch.Tensor, op: Op) -> LinearConfig:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not fit: [M, K] and [N, K]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}")
    m, k = x.shape
    if m > MAX_SKINNY_ROWS or not weight.is_contiguous() or x.stride(1) != 1:
        return CUBLAS
    bulk = linear_hopper.supported(x, weight)
    return choose(m, weight.shape[0], k, x.dtype, traits(x.device), op, bulk=bulk)


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Zeros, which each split kernel leaves as zeros. Allocated by the first launch, before any graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a linear layer once before capturing one in a CUDA graph")
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def _prefetch_bytes(config: LinearConfig, row_bytes: int) -> int:
    """As many as the configuration says, or the power of two that is left of the row; 0 for too few to matter."""
    size = min(config.prefetch, 1 << (row_bytes.bit_length() - 1) if row_bytes > 0 else 0)
    return size if size >= 256 else 0


def _launch(
    config: LinearConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
    pdl: bool,
) -> None:
    m, k = x.shape
    n = weight.shape[0]
    device = traits(x.device)
    use_pdl = pdl and device.has_pdl
    block_m, block_n, block_k = tile_rows(config, m), config.block_n, config.block_k
    tiles = -(-n // block_n)
    if m == 0 or n == 0:
        return
    residual = out if add else None
    fused = {
        "NORM": norm_weight is not None,
        "GATED": gated,
        "BIAS": bias is not None,
        "ADD": add,
        "USE_PDL": use_pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": use_pdl,
    }
    if config.kind == "vector":
        if m > MAX_VECTOR_ROWS:
            raise ValueError(f"{m} rows are too many for the vector kernel")
        ahead = _prefetch_bytes(config, (k - block_k) * x.element_size())
        vector_kernel[(tiles,)](
            x, norm_weight, weight, bias, residual, out, m, n, x.stride(0), out.stride(0), eps,
            k, block_m, block_n, block_k, ahead, **fused,
        )  # fmt: skip
        return
    if m > MAX_SKINNY_ROWS or (config.split_k > 1 and tiles > MAX_SPLIT_TILES):
        raise ValueError(f"{m} rows and {tiles} tiles are too many for the {config.kind} kernel")
    partials = arrivals = None
    if config.split_k > 1:
        slot = (block_n + (norm_weight is not None)) * block_m
        partials = torch.empty(tiles * config.split_k * slot, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device)
    if config.kind == "hopper":
        linear_hopper.launch(
            config, x, weight, out, bias, norm_weight, residual, partials, arrivals, eps, gated, use_pdl
        )
        return
    whole = k % (block_k * config.split_k) == 0
    ahead = _prefetch_bytes(config, k // config.split_k * x.element_size()) if whole else 0
    skinny_kernel[(tiles * config.split_k,)](
        x, norm_weight, weight, bias, residual, out, partials, arrivals, m, n, k, x.stride(0), out.stride(0), eps,
        block_m, block_n, block_k, config.split_k, ahead, whole, **fused,
    )  # fmt: skip
