"""Rotary positions (arXiv 2104.09864) in DeepSeek's interleaved layout, with YaRN for the long-context stages.

Dimensions (2i, 2i+1) form a pair, turned by the angle position · θ^(−2i/P).
"""

import math
from typing import Any

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
    result: Tensor = _Rotate.apply(x, table)
    return result


def rotate_heads_(x: Tensor, table: Tensor, head_dim: int) -> Tensor:
    """Turns the last P values of every head in place: x [B, S, heads · head_dim], which must be nobody else's."""
    result: Tensor = _RotateHeads.apply(x, table, head_dim)
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        return _rotate_(x.clone(), table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotate_(grad.clone(), ctx.table, inverse=True), None


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, head_dim: int) -> Tensor:
        ctx.table, ctx.head_dim = table, head_dim
        ctx.mark_dirty(x)
        _rotate_(x.unflatten(-1, (-1, head_dim)), table)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Attention made it for its queries alone; elsewhere a copy would be in place.
        turned = _rotate_(grad.unflatten(-1, (-1, ctx.head_dim)), ctx.table, inverse=True)
        return turned.flatten(-2), None, None


def _rotate_(x: Tensor, table: Tensor, *, inverse: bool = False) -> Tensor:
    """Turns the last P of x [B, S, heads, d >= P] in place, and returns x."""
    dim = 2 * table.shape[-2]
    if x.is_cuda:
        from model.kernels.rope import rotate_

        rotate_(x, table, rotary_dim=dim, inverse=inverse)
        return x
    part = x[..., x.shape[-1] - dim :]
    cos, sin = table.unsqueeze(-3).unbind(-1)
    even, odd = part.float().unflatten(-1, (-1, 2)).unbind(-1)
    sin = -sin if inverse else sin
    part.copy_(torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2))
    return x


def softmax_scale(qk_head_dim: int, scaling: RopeScaling | None) -> float:
    """1/√qk_head_dim, times YaRN's temperature where configured."""
    scale = qk_head_dim**-0.5
    return scale if scaling is None else scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """√t = 0.1 · mscale · ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0
