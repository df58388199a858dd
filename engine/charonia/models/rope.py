"""Tables of rotary position embeddings."""

import math

import torch

from charonia.rope_config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def cos_sin_table(
    config: RopeConfig, head_dim: int, max_positions: int, device: torch.device
) -> torch.Tensor:
    """The table that `AttentionContext.attend` reads.

    Args:
        config: base and scaling.
        head_dim: D, even; all of it is rotated.
        max_positions: rows.
        device: of the result.

    Returns:
        `[max_positions, D]` fp32: `D / 2` cosines, then `D / 2` sines, YaRN's attention factor multiplied in.
    """
    inv_freq = inverse_frequencies(config, head_dim).to(device)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * inv_freq
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if isinstance(config.scaling, YarnScaling):
        table *= config.scaling.attention_factor
    return table


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each rotated pair: `[head_dim / 2]` fp32, on the CPU."""
    wavelengths = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / wavelengths
    match config.scaling:
        case None:
            return inv_freq
        case LinearScaling(factor=factor):
            return inv_freq / factor
        case Llama3Scaling() as scaling:
            return _llama3(inv_freq, scaling)
        case YarnScaling() as scaling:
            kept = _yarn_kept(config.theta, head_dim, scaling)
            return inv_freq * kept + 1.0 / (scaling.factor * wavelengths) * (1.0 - kept)


def _llama3(inv_freq: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Scale each frequency by how often it turns within the original context.

    With `low_freq_factor` turns or fewer it is divided by the factor, with `high_freq_factor` or more kept.
    """
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1.0 - kept) * inv_freq / scaling.factor + kept * inv_freq


def _yarn_kept(theta: float, head_dim: int, scaling: YarnScaling) -> torch.Tensor:
    """How much of each frequency is kept: `[head_dim / 2]`, 1 for fast pairs, 0 for slow, a ramp between."""

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        return (
            head_dim
            * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    return 1.0 - ramp.clamp(0.0, 1.0)
