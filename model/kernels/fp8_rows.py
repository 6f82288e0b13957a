"""Rows to E4M3 codes with a scale for every 128 values, and back, in one pass each: `model.packing` on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8_quantize import divide

GROUP = 128
_TILES = 32
_LARGEST = tl.constexpr(448.0)


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, [R, G, 128] uint8, zeros after the last column, and the scale of each 128, [R, G] in fp32: rows
    [R, D]. A group of zeros has scale 1."""
    rows = rows.contiguous()
    num_rows, width = rows.shape
    groups = triton.cdiv(width, GROUP)
    codes = torch.empty(num_rows, groups, GROUP, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(num_rows, groups, device=rows.device)
    if num_rows:
        tiles = num_rows * groups
        _encode_kernel[(triton.cdiv(tiles, _TILES),)](
            rows, codes, scales, tiles, groups, width, TILES=_TILES, GROUP=GROUP, num_warps=4
        )
    return codes.view(torch.uint8), scales


def decode_rows(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse, up to rounding: [R, width]."""
    num_rows, groups = scales.shape
    rows = torch.empty(num_rows, width, dtype=dtype, device=codes.device)
    if num_rows:
        tiles = num_rows * groups
        _decode_kernel[(triton.cdiv(tiles, _TILES),)](
            codes.view(torch.float8_e4m3fn), scales, rows, tiles, groups, width, TILES=_TILES, GROUP=GROUP, num_warps=4
        )
    return rows


@triton.jit
def _places(
    tiles: tl.tensor, groups: tl.tensor, width: tl.tensor, TILES: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's groups [TILES], where their values lie in rows [TILES, GROUP], and which there are."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    column = (tile % groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tile, (tile // groups)[:, None] * width + column, (tile < tiles)[:, None] & (column < width)


@triton.jit(do_not_specialize=["tiles"])
def _encode_kernel(
    rows: tl.tensor, codes: tl.tensor, scales: tl.tensor, tiles: tl.tensor, groups: tl.tensor, width: tl.tensor,
    TILES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tile, place, exists = _places(tiles, groups, width, TILES, GROUP)
    x = tl.load(rows + place, mask=exists, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest > 0, divide(largest, _LARGEST + largest * 0.0), 1.0)
    within = (tile < tiles)[:, None]
    code = divide(x, scale[:, None] + x * 0.0).to(tl.float8e4nv)
    tl.store(codes + tile[:, None] * GROUP + tl.arange(0, GROUP)[None, :], code, mask=within)
    tl.store(scales + tile, scale, mask=tile < tiles)


@triton.jit(do_not_specialize=["tiles"])
def _decode_kernel(
    codes: tl.tensor, scales: tl.tensor, rows: tl.tensor, tiles: tl.tensor, groups: tl.tensor, width: tl.tensor,
    TILES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tile, place, exists = _places(tiles, groups, width, TILES, GROUP)
    code = tl.load(codes + tile[:, None] * GROUP + tl.arange(0, GROUP)[None, :], mask=exists, other=0.0)
    x = code.to(tl.float32) * tl.load(scales + tile, mask=tile < tiles, other=1.0)[:, None]
    tl.store(rows + place, x.to(rows.dtype.element_ty), mask=exists)
