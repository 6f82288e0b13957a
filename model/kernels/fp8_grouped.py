"""Products of stacked experts on E4M3 codes with a scale for each 1 × 128 or 128 × 128 of them.

Tensor cores add up 128 products at a time; these sums leave them to be scaled and added up in fp32, as the report does
(section 3.3.2). On Hopper both operands must have the dimension that is summed last:

    rows ordered by expert      codes [R, K], scale_inv [K/128, R]            for y = x Wᵀ and dx = dy W
    the same along tokens       codes [K, P], scale_inv [P/128, K]            for dW = dyᵀ x
    weights                     codes [E, N, K], scale_inv [E, N/128, K/128]

Along tokens every expert begins a new tile: its rows stand at 128 · (tiles of the experts before), filled up with zeros
to whole tiles, and P = 128 (⌊R/128⌋ + E) is a bound for any load, so counts are never read back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8_quantize import Codes
from model.kernels.groups import find_tile

BLOCK = 128
ROWS_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4}
COLUMNS_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4}


def multiply_rows(rows: Codes, weights: Codes, counts: Tensor) -> Tensor:
    """x Wᵀ with the weight of each row's expert: codes [R, K] of rows ordered by expert and [E, N, K] of weights, with
    `counts` [E] rows each, to [R, N] in bf16. K and N are multiples of 128."""
    num_rows, size = rows.codes.shape
    num_experts, width, _ = weights.codes.shape
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=counts.device)
    tiles = triton.cdiv(num_rows, ROWS_TILE["BLOCK_M"]) + num_experts
    if num_rows:
        _rows_kernel[(tiles * triton.cdiv(width, ROWS_TILE["BLOCK_N"]),)](
            *rows, *weights, counts, out, num_rows, width, size,
            EXPERTS=num_experts, EXPERTS_BLOCK=triton.next_power_of_2(num_experts), BLOCK_K=BLOCK, **ROWS_TILE,
        )  # fmt: skip
    return out


def add_products_of_columns(total: Tensor, grad: Codes, rows: Codes, counts: Tensor, *, is_first: bool) -> None:
    """Adds dyᵀ x of each expert to `total` [E, M, N] in fp32, or with `is_first` stores it there: codes along tokens of
    the gradients [M, P] and of the rows [N, P]. M and N are multiples of 128."""
    num_experts, height, width = total.shape
    tiles = triton.cdiv(height, COLUMNS_TILE["BLOCK_M"]) * triton.cdiv(width, COLUMNS_TILE["BLOCK_N"])
    _columns_kernel[(num_experts * tiles,)](
        total, *grad, *rows, counts, height, width, grad.codes.shape[1],
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts), EXPERTS=num_experts, IS_FIRST=is_first, BLOCK_K=BLOCK,
        **COLUMNS_TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    codes: tl.tensor, scale_inv: tl.tensor, weights: tl.tensor, weights_scale_inv: tl.tensor, counts: tl.tensor,
    out: tl.tensor, num_rows: tl.tensor, width: tl.tensor, size: tl.tensor,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    tiles_n = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert, begin, end, _ = find_tile(counts, tile, EXPERTS, EXPERTS_BLOCK, BLOCK_M)
    if expert >= EXPERTS:
        return
    row = begin + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row, is_n = row < end, n < width
    steps = size // BLOCK_K
    at_codes = codes + row.to(tl.int64)[:, None] * size + k[None, :]
    at_weights = weights + (expert.to(tl.int64) * width + n)[:, None] * size + k[None, :]
    at_scale = scale_inv + row
    at_weights_scale = weights_scale_inv + (expert * tl.cdiv(width, BLOCK_K) + n // BLOCK_K) * steps
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(steps):
        a = tl.load(at_codes, mask=is_row[:, None], other=0.0)
        b = tl.load(at_weights, mask=is_n[:, None], other=0.0)
        factor = tl.load(at_scale, mask=is_row, other=0.0)
        weights_factor = tl.load(at_weights_scale, mask=is_n, other=0.0)
        sums += tl.dot(a, tl.trans(b)) * (factor[:, None] * weights_factor[None, :])
        at_codes += BLOCK_K
        at_weights += BLOCK_K
        at_scale += num_rows
        at_weights_scale += 1
    at = out + row.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(at, sums.to(tl.bfloat16), mask=is_row[:, None] & is_n[None, :])


@triton.jit(do_not_specialize=["num_places"])
def _columns_kernel(
    total: tl.tensor, grad: tl.tensor, grad_scale_inv: tl.tensor, rows: tl.tensor, rows_scale_inv: tl.tensor,
    counts: tl.tensor, height: tl.tensor, width: tl.tensor, num_places: tl.tensor,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, IS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    expert, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    number = tl.arange(0, EXPERTS_BLOCK)
    steps_of = tl.cdiv(tl.load(counts + number, mask=number < EXPERTS, other=0), BLOCK_K)
    first = tl.sum(tl.where(number < expert, steps_of, 0))
    steps = tl.sum(tl.where(number == expert, steps_of, 0))
    if steps == 0 and not IS_FIRST:
        return

    # Tiles in the order of small squares, which share what they read in the cache.
    group = tile // (GROUP * tiles_n)
    in_group = min(tiles_m - group * GROUP, GROUP)
    place = tile % (GROUP * tiles_n)
    m = (group * GROUP + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    is_m, is_n = m < height, n < width
    at_grad = grad + m.to(tl.int64)[:, None] * num_places + k[None, :]
    at_rows = rows + n.to(tl.int64)[:, None] * num_places + k[None, :]
    at_grad_scale = grad_scale_inv + first * height + m
    at_rows_scale = rows_scale_inv + first * width + n
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(steps):
        a = tl.load(at_grad, mask=is_m[:, None], other=0.0)
        b = tl.load(at_rows, mask=is_n[:, None], other=0.0)
        grad_factor = tl.load(at_grad_scale, mask=is_m, other=0.0)
        rows_factor = tl.load(at_rows_scale, mask=is_n, other=0.0)
        sums += tl.dot(a, tl.trans(b)) * (grad_factor[:, None] * rows_factor[None, :])
        at_grad += BLOCK_K
        at_rows += BLOCK_K
        at_grad_scale += height
        at_rows_scale += width
    at = total + (expert.to(tl.int64) * height + m)[:, None] * width + n[None, :]
    mask = is_m[:, None] & is_n[None, :]
    if not IS_FIRST:
        sums += tl.load(at, mask=mask)
    tl.store(at, sums, mask=mask)
