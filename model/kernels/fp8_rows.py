"""Rows to E4M3 codes with a scale for every 128 values, and back, in one pass each: `model.packing` on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8_quantize import divide
from model.packing import GROUP, codes_and_scales, packed_width

_TILES = 32
_LARGEST = tl.constexpr(448.0)


def encode_rows(rows: Tensor) -> Tensor:
    """Packed rows [R, G * 132] uint8 of rows [R, D]: codes, zeros after the last column, and the scale of each group. A
    group of zeros has scale 1."""
    rows = rows.contiguous()
    packed = torch.empty(len(rows), packed_width(rows.shape[1]), dtype=torch.uint8, device=rows.device)
    _launch(_encode_kernel, rows, packed)
    return packed


def decode_rows(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse, up to rounding: [R, width]."""
    rows = torch.empty(len(packed), width, dtype=dtype, device=packed.device)
    _launch(_decode_kernel, rows, packed)
    return rows


def _launch(kernel: triton.runtime.KernelInterface, rows: Tensor, packed: Tensor) -> None:
    """Runs a kernel from one to the other; each of its programs takes `_TILES` groups of 128."""
    if len(rows) == 0:
        return
    codes, scales = codes_and_scales(packed)
    tiles = scales.numel()
    kernel[(triton.cdiv(tiles, _TILES),)](
        rows, codes, scales, tiles,
        WIDTH=rows.shape[1], GROUPS=scales.shape[1], CODES_STRIDE=codes.stride(0), SCALES_STRIDE=scales.stride(0),
        TILES=_TILES, GROUP=GROUP, num_warps=4,
    )  # fmt: skip


@triton.jit
def _places(
    tiles: tl.tensor, GROUPS: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of this program's groups: which there are, their rows, which of their row they are, all [TILES]; and the columns
    of their values, [TILES, GROUP]."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    group = tile % GROUPS
    return tile < tiles, tile // GROUPS, group, group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit(do_not_specialize=["tiles"])
def _encode_kernel(
    rows: tl.tensor, codes: tl.tensor, scales: tl.tensor, tiles: tl.tensor,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES_STRIDE: tl.constexpr, SCALES_STRIDE: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    exists, row, group, column = _places(tiles, GROUPS, TILES, GROUP)
    x = tl.load(rows + row[:, None] * WIDTH + column, mask=exists[:, None] & (column < WIDTH), other=0.0)
    x = x.to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest > 0, divide(largest, _LARGEST + largest * 0.0), 1.0)
    code = divide(x, scale[:, None] + x * 0.0).to(tl.float8e4nv)
    tl.store(codes + row[:, None] * CODES_STRIDE + column, code, mask=exists[:, None])
    tl.store(scales + row * SCALES_STRIDE + group, scale, mask=exists)


@triton.jit(do_not_specialize=["tiles"])
def _decode_kernel(
    rows: tl.tensor, codes: tl.tensor, scales: tl.tensor, tiles: tl.tensor,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, CODES_STRIDE: tl.constexpr, SCALES_STRIDE: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    exists, row, group, column = _places(tiles, GROUPS, TILES, GROUP)
    within = exists[:, None] & (column < WIDTH)
    code = tl.load(codes + row[:, None] * CODES_STRIDE + column, mask=within, other=0.0)
    scale = tl.load(scales + row * SCALES_STRIDE + group, mask=exists, other=1.0)
    x = code.to(tl.float32) * scale[:, None]
    tl.store(rows + row[:, None] * WIDTH + column, x.to(rows.dtype.element_ty), mask=within)
