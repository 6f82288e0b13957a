"""Rounding to FP8 and back, in plain torch: the reference that trains on a CPU and that the GPU's kernels must match.

    scale = max_fp8 / amax(|x|)        codes = round(x · scale)        x ≈ codes · scale_inv,  scale_inv = 1 / scale

over all values that share a scale: a tile of 1 × 128, a block of 128 × 128, or a whole tensor. With `power_of_two` a
scale is rounded down to 2^k, so that applying it and taking it off again change nothing but the exponent. The rules at
the edges are those of Transformer Engine (common/recipe/recipe_common.cuh), whose bits these functions reproduce:

    amax is 0 or not finite     scale = 1: nothing to stretch, and infinities become the largest code
    amax so small that the      the largest finite number of the input's dtype, so that it stays a number (with
    scale would be infinite     `power_of_two`: 2^127)
    a ragged edge               the tile is as if filled up with zeros, so it has the scale of what is there

Rounding is to the nearest code, ties to the even one, and values beyond the last code become that.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128
_EXPONENT_BITS = 0x7F800000


class Quantized(NamedTuple):
    """FP8 codes in the shape of what was quantised, and the fp32 factors that take them back, one for each scale."""

    codes: Tensor
    scale_inv: Tensor


def scale_of(amax: Tensor, format: torch.dtype, source: torch.dtype, *, power_of_two: bool) -> Tensor:
    """The scales for the largest magnitudes `amax` (fp32, any shape) of values in dtype `source`."""
    # A number divided by a tensor would be the product with a reciprocal, which is rounded twice.
    scale = torch.full_like(amax, torch.finfo(format).max) / amax
    scale = torch.where(scale.isinf(), torch.finfo(source).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def encode(x: Tensor, scale: Tensor, format: torch.dtype) -> Tensor:
    """The codes of x · scale, where `scale` is broadcast over x."""
    largest = torch.finfo(format).max
    return (x.float() * scale).clamp(-largest, largest).to(format)


def quantize_tiles(x: Tensor, *, power_of_two: bool) -> Quantized:
    """E4M3 codes of x [M, K] with a scale for each 1 × 128 values of a row: scale_inv [M, ⌈K/128⌉]."""
    tiles = F.pad(x, (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    scale = scale_of(tiles.abs().amax(-1).float(), E4M3, x.dtype, power_of_two=power_of_two)
    codes = encode(tiles, scale.unsqueeze(-1), E4M3).flatten(1)[:, : x.shape[1]]
    return Quantized(codes, 1 / scale)


def quantize_blocks(weight: Tensor, *, power_of_two: bool) -> Quantized:
    """E4M3 codes of matrices [..., O, I] with a scale for each 128 × 128: scale_inv [..., ⌈O/128⌉, ⌈I/128⌉]."""
    rows, columns = weight.shape[-2:]
    blocks = F.pad(weight, (0, -columns % TILE, 0, -rows % TILE)).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    scale = scale_of(blocks.abs().amax((-3, -1)).float(), E4M3, weight.dtype, power_of_two=power_of_two)
    codes = encode(blocks, scale[..., :, None, :, None], E4M3).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return Quantized(codes, 1 / scale)


def dequantize_tiles(quantized: Quantized) -> Tensor:
    """The fp32 values of `quantize_tiles`."""
    codes, scale_inv = quantized
    return codes.float() * scale_inv.repeat_interleave(TILE, 1)[:, : codes.shape[1]]


def dequantize_blocks(quantized: Quantized) -> Tensor:
    """The fp32 values of `quantize_blocks`."""
    codes, scale_inv = quantized
    rows, columns = codes.shape[-2:]
    wide = scale_inv.repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)
    return codes.float() * wide[..., :rows, :columns]


class PaddedGroups(NamedTuple):
    """Rows ordered by group, each group filled up to whole tiles of 128 rows: `places` [R] are those of the rows among
    128 · `num_tiles`. The number of tiles is a bound known without reading the counts back."""

    places: Tensor
    num_tiles: int

    def spread(self, rows: Tensor) -> Tensor:
        """[R, D] to tiles [num_tiles, 128, D], zero where no row is."""
        padded = rows.new_zeros(self.num_tiles * TILE, rows.shape[1])
        return padded.index_copy(0, self.places, rows).unflatten(0, (-1, TILE))


def pad_groups(counts: Tensor, num_rows: int) -> PaddedGroups:
    """Where the rows of groups of `counts` [E] (int64), `num_rows` in all, stand when every group has whole tiles."""
    tiles = (counts + TILE - 1) // TILE
    shifts = TILE * (tiles.cumsum(0) - tiles) - (counts.cumsum(0) - counts)
    rows = torch.arange(num_rows, device=counts.device)
    places = rows + shifts.repeat_interleave(counts, output_size=num_rows)
    return PaddedGroups(places, num_rows // TILE + len(counts))
