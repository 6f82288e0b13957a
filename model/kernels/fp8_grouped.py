"""Products of stacked experts on E4M3 codes with a scale for each 1 × 128 or 128 × 128 of them.

Tensor cores add up 128 products at a time; these sums leave them to be scaled and added up in fp32, as the report does
(section 3.3.2). On Hopper both operands must have the dimension that is summed last:

    rows ordered by expert      codes [R, K], scale_inv [K/128, R]            for y = x Wᵀ and dx = dy W
    the same along tokens       codes [K, P], scale_inv [P/128, K]            for dW = dyᵀ x
    weights                     codes [E, N, K], scale_inv [E, N/128, K/128]

Along tokens every expert begins a new tile: its rows stand at 128 · (tiles of the experts before), filled up with zeros
to whole tiles, and P = 128 (⌊R/128⌋ + E) is a bound for any load, so counts are never read back.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.fp8_quantize import Codes
from model.kernels.groups import tile_table

BLOCK = 128
# Small tiles, of which a multiprocessor takes three: one is scaled while others multiply.
ROWS_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
COLUMNS_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "GROUP": 8, "num_warps": 4, "num_stages": 3}


def multiply_rows(rows: Codes, weights: Codes, counts: Tensor) -> Tensor:
    """x Wᵀ with the weight of each row's expert: codes [R, K] of rows ordered by expert and [E, N, K] of weights, with
    `counts` [E] rows each, to [R, N] in bf16. K and N are multiples of 128."""
    num_rows, size = rows.codes.shape
    num_experts, width, _ = weights.codes.shape
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=counts.device)
    tiles = triton.cdiv(num_rows, ROWS_TILE["BLOCK_M"]) + num_experts
    if num_rows:
        table = tile_table(counts, tiles, ROWS_TILE["BLOCK_M"])
        _rows_kernel[(tiles * (width // ROWS_TILE["BLOCK_N"]),)](
            _tiles(rows.codes, ROWS_TILE["BLOCK_M"]), rows.scale_inv,
            _tiles(weights.codes.flatten(0, 1), ROWS_TILE["BLOCK_N"]), weights.scale_inv,
            table, out, num_rows, width, size, EXPERTS=num_experts, BLOCK=BLOCK, **ROWS_TILE,
        )  # fmt: skip
    return out


def add_products_of_columns(total: Tensor, grad: Codes, rows: Codes, counts: Tensor, *, is_first: bool) -> None:
    """Adds dyᵀ x of each expert to `total` [E, M, N] in fp32, or with `is_first` stores it there: codes along tokens of
    the gradients [M, P] and of the rows [N, P]. M and N are multiples of 128."""
    num_experts, height, width = total.shape
    tiles = (height // COLUMNS_TILE["BLOCK_M"]) * (width // COLUMNS_TILE["BLOCK_N"])
    _columns_kernel[(num_experts * tiles,)](
        total, _tiles(grad.codes, COLUMNS_TILE["BLOCK_M"]), grad.scale_inv,
        _tiles(rows.codes, COLUMNS_TILE["BLOCK_N"]), rows.scale_inv, counts, height, width,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts), EXPERTS=num_experts, IS_FIRST=is_first, BLOCK=BLOCK,
        **COLUMNS_TILE,
    )  # fmt: skip


def _tiles(codes: Tensor, height: int) -> Any:
    """A matrix of codes as what the copy engine reads tiles of so many rows from."""
    return TensorDescriptor.from_tensor(codes, [height, BLOCK])


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    codes: tl.tensor, scale_inv: tl.tensor, weights: tl.tensor, weights_scale_inv: tl.tensor, table: tl.tensor,
    out: tl.tensor, num_rows: tl.tensor, width: tl.tensor, size: tl.tensor,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    tiles_n = width // BLOCK_N
    tile, n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    expert = tl.load(table + 3 * tile)
    if expert >= EXPERTS:
        return
    begin, end = tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)
    # Rows past the end are another expert's, and not stored.
    row = begin + tl.arange(0, BLOCK_M)
    is_row = row < end
    steps = size // BLOCK
    at_scale = scale_inv + row
    # A tile of columns is within one of the 128 that share a scale.
    at_weights_scale = weights_scale_inv + (expert * (width // BLOCK) + n * BLOCK_N // BLOCK) * steps
    first = expert * width + n * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Factors are read a step ahead: a product that waited for its own would leave the tensor cores idle.
    factor = tl.load(at_scale, mask=is_row, other=0.0) * tl.load(at_weights_scale)
    for step in range(steps):
        a = codes.load([begin, step * BLOCK])
        b = weights.load([first, step * BLOCK])
        following = min(step + 1, steps - 1)
        next_factor = tl.load(at_scale + following * num_rows, mask=is_row, other=0.0)
        next_factor *= tl.load(at_weights_scale + following)
        sums += tl.dot(a, b.T) * factor[:, None]
        factor = next_factor
    at = out + row.to(tl.int64)[:, None] * width + n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(at, sums.to(tl.bfloat16), mask=is_row[:, None])


@triton.jit
def _columns_kernel(
    total: tl.tensor, grad: tl.tensor, grad_scale_inv: tl.tensor, rows: tl.tensor, rows_scale_inv: tl.tensor,
    counts: tl.tensor, height: tl.tensor, width: tl.tensor,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, IS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tiles_m, tiles_n = height // BLOCK_M, width // BLOCK_N
    expert, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    number = tl.arange(0, EXPERTS_BLOCK)
    steps_of = tl.cdiv(tl.load(counts + number, mask=number < EXPERTS, other=0), BLOCK).to(tl.int32)
    begin = tl.sum(tl.where(number < expert, steps_of, 0))
    steps = tl.sum(tl.where(number == expert, steps_of, 0))
    if steps == 0 and not IS_FIRST:
        return

    # Tiles in the order of small squares, which share what they read in the cache.
    group = tile // (GROUP * tiles_n)
    in_group = min(tiles_m - group * GROUP, GROUP)
    place = tile % (GROUP * tiles_n)
    first_m, first_n = (group * GROUP + place % in_group) * BLOCK_M, (place // in_group) * BLOCK_N
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    at_grad_scale = grad_scale_inv + begin * height + m
    at_rows_scale = rows_scale_inv + begin * width + n
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(begin, begin + steps):
        a = grad.load([first_m, step * BLOCK])
        b = rows.load([first_n, step * BLOCK])
        sums += tl.dot(a, b.T) * tl.load(at_grad_scale)[:, None] * tl.load(at_rows_scale)[None, :]
        at_grad_scale += height
        at_rows_scale += width
    at = total + (expert.to(tl.int64) * height + m)[:, None] * width + n[None, :]
    if not IS_FIRST:
        sums += tl.load(at)
    tl.store(at, sums)
