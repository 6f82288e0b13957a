"""Rotary positions (arXiv 2104.09864) in DeepSeek's interleaved layout, with YaRN for the long-context stages.

Dimensions (2i, 2i+1) form a pair, turned by the angle position · θ^(−2i/P).
"""

import math

import torch
from torch import Tensor

from model.config import RopeScaling


def rotary_frequencies(dim: int, *, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair, [dim/2] in fp32. YaRN is applied only where `scaling` is given."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequencies

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that turns this many times over the original length."""
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0, 1)
    return frequencies * (1 - interpolated) + frequencies / scaling.factor * interpolated


def rotary_table(frequencies: Tensor, positions: Tensor, *, scaling: RopeScaling | None) -> Tensor:
    """cos and sin of every angle: positions [..., S] to [..., S, P/2, 2] in fp32."""
    angles = positions.float().unsqueeze(-1) * frequencies
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    if scaling is None:
        return table
    return table * (yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim))


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs of x [B, S, heads, P] by `table` [S, P/2, 2]; computed in fp32, returned in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table.unsqueeze(-3).unbind(-1)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def softmax_scale(qk_head_dim: int, scaling: RopeScaling | None) -> float:
    """1/√qk_head_dim, times YaRN's temperature where configured."""
    scale = qk_head_dim**-0.5
    return scale if scaling is None else scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """√t = 0.1 · mscale · ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0
