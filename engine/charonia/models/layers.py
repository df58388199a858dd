"""The parts that models are made of, and the builder that makes them. A part holds its weights, nothing else.

The builder allocates every parameter once, fused (QKV, gate and up), and hands out *slots*: views of it for
the loader to fill. Another weight format means another builder, not other model files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import charonia_kernels as kernels
import torch
import torch.nn.functional as F

from charonia.models.rope import cos_sin_table
from charonia.rope_config import RopeConfig


class RMSNorm:
    """Root-mean-square norm; also of a residual stream that an update joins first."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """Args: weight: `[H]`, in the model's dtype or fp32. eps: added to the mean square."""
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H]` to `[T, H]`."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, update: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add `update [T, H]` to `residual [T, H]` in place; norm that."""
        return kernels.add_rms_norm(update, residual, self.weight, self.eps)


class LayerNorm:
    """Norm to mean 0 and variance 1, then scaled and shifted (Ba et al., 2016), by PyTorch's own kernel."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        """Args: weight and bias: `[H]`, in the model's dtype. eps: added to the variance."""
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, H]` to `[T, H]`."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear:
    """`x @ weight.T + bias`, alone or as one kernel with what stands before or behind it."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Args: weight: `[N, K]`. bias: `[N]` or None."""
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[T, N]`, in x's dtype."""
        return kernels.linear(x, self.weight, self.bias)

    def of_normed(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[T, N]`: the projection of `norm(x)`."""
        return kernels.norm_linear(x, norm.weight, norm.eps, self.weight, self.bias)

    def silu_mul_of_normed(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[T, N / 2]`: `silu(gate) * up`, where the fused gate and up project `norm(x)`."""
        if self.bias is not None:
            return kernels.silu_mul(self.of_normed(norm, x))
        return kernels.norm_linear_silu_mul(x, norm.weight, norm.eps, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """Add the projection of `x [T, K]` to `residual [T, N]` in place."""
        kernels.linear_add(x, self.weight, residual, self.bias)


class Embedding:
    """Rows of a matrix by token id, scaled if `scale` is given (Gemma)."""

    __slots__ = ("scale", "weight")

    def __init__(self, weight: torch.Tensor, scale: float | None = None) -> None:
        """Args: weight: `[vocab_size, H]`. scale: rounded to the weight's dtype before it multiplies."""
        self.weight = weight
        self.scale = None if scale is None else torch.tensor(scale, dtype=weight.dtype).item()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` integers to a new `[T, H]`."""
        return kernels.embedding(token_ids, self.weight, self.scale)


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where one tensor of the checkpoint goes."""

    name: str
    target: torch.Tensor
    """A view of a parameter, of the checkpoint tensor's shape."""
    offset: float = 0.0
    """Added while loading (Gemma stores its norm weights less one)."""
    alias: bool = False
    """The target has another slot too: the checkpoint may repeat the tensor, with the same values."""


class WeightBuilder:
    """Allocates the parameters of one model, uninitialised but for norms (ones) and biases (zeros).

    Attributes:
        slots: every tensor that the checkpoint must hold, and the aliases that it may hold.
        passed_over: tensors that the checkpoint may hold beside those, and that nothing reads.
        num_bytes: memory of all parameters and tables.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device, max_positions: int) -> None:
        """Args: dtype and device: of the parameters. max_positions: rows of the rotary tables."""
        self.slots: list[WeightSlot] = []
        self.passed_over: set[str] = set()
        self.num_bytes = 0
        self._dtype = dtype
        self._device = device
        self._max_positions = max_positions
        self._tables: dict[tuple[RopeConfig, int], torch.Tensor] = {}

    def linear(
        self, prefix: str, in_features: int, outputs: Mapping[str, int], *, bias: bool = False
    ) -> Linear:
        """One projection, fused of `prefix.name` for each name in `outputs`, which maps it to its rows."""
        rows = sum(outputs.values())
        weight = self._own(torch.empty(rows, in_features, dtype=self._dtype, device=self._device))
        biases = self._own(torch.zeros(rows, dtype=self._dtype, device=self._device)) if bias else None
        first = 0
        for name, count in outputs.items():
            self.slots.append(WeightSlot(f"{prefix}.{name}.weight", weight[first : first + count]))
            if biases is not None:
                self.slots.append(WeightSlot(f"{prefix}.{name}.bias", biases[first : first + count]))
            first += count
        return Linear(weight, biases)

    def embedding(
        self, name: str, vocab_size: int, hidden_size: int, *, scale: float | None = None
    ) -> Embedding:
        """The token embedding `name.weight`."""
        weight = self._own(torch.empty(vocab_size, hidden_size, dtype=self._dtype, device=self._device))
        self.slots.append(WeightSlot(f"{name}.weight", weight))
        return Embedding(weight, scale)

    def lm_head(self, embedding: Embedding, *, tied: bool) -> Linear:
        """The output head `lm_head.weight`: a matrix of its own, or the embedding's."""
        weight = embedding.weight
        if not tied:
            weight = self._own(torch.empty_like(weight))
        self.slots.append(WeightSlot("lm_head.weight", weight, alias=tied))
        return Linear(weight)

    def norm(self, name: str, size: int, eps: float, *, plus_one: bool = False) -> RMSNorm:
        """The norm `name.weight`; `plus_one` makes it 1 + w, in fp32, as bf16 would round that."""
        dtype = torch.float32 if plus_one else self._dtype
        weight = self._own(torch.ones(size, dtype=dtype, device=self._device))
        self.slots.append(WeightSlot(f"{name}.weight", weight, offset=1.0 if plus_one else 0.0))
        return RMSNorm(weight, eps)

    def layer_norm(self, name: str, size: int, eps: float) -> LayerNorm:
        """The norm `name.weight` and `name.bias`."""
        weight = self._own(torch.ones(size, dtype=self._dtype, device=self._device))
        bias = self._own(torch.zeros(size, dtype=self._dtype, device=self._device))
        self.slots += [WeightSlot(f"{name}.weight", weight), WeightSlot(f"{name}.bias", bias)]
        return LayerNorm(weight, bias, eps)

    def pass_over(self, *names: str) -> None:
        """Let the checkpoint hold tensors that the model does not use."""
        self.passed_over.update(names)

    def rope(self, config: RopeConfig, head_dim: int) -> torch.Tensor:
        """The rotary table `[max_positions, head_dim]`, fp32, shared by all layers with an equal `config`."""
        key = (config, head_dim)
        if key not in self._tables:
            self._tables[key] = self._own(cos_sin_table(config, head_dim, self._max_positions, self._device))
        return self._tables[key]

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.nbytes
        return tensor
