"""The weight gradients of stacked experts, dW = Σ grad xᵀ over the rows of each, added to their sum in fp32.

One pass over memory takes the place of a product in 16 bits, zeros where an expert has no rows, and the addition; and
nothing is rounded on the way. A program computes one tile of one expert's matrix.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}


def add_weight_gradients(total: Tensor, grad: Tensor, rows: Tensor, counts: Tensor, *, is_first: bool) -> None:
    """Adds to `total` [E, M, N] in fp32 the products of grad [R, M] and rows [R, N], ordered by expert, of which each
    has `counts` [E]; or with `is_first` stores them there."""
    num_experts, height, width = total.shape
    assert all(tensor.is_contiguous() for tensor in (total, grad, rows))
    tiles = triton.cdiv(height, TILE["BLOCK_M"]) * triton.cdiv(width, TILE["BLOCK_N"])
    even = height % TILE["BLOCK_M"] == width % TILE["BLOCK_N"] == 0
    _weight_gradient_kernel[(num_experts * tiles,)](
        total, grad, rows, counts.cumsum(0), height, width, IS_FIRST=is_first, EVEN=even, **TILE
    )


@triton.jit
def _weight_gradient_kernel(
    total: tl.tensor, grad: tl.tensor, rows: tl.tensor, ends: tl.tensor, height: tl.tensor, width: tl.tensor,
    IS_FIRST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    number = tl.program_id(0)
    expert, tile = number // (tiles_m * tiles_n), number % (tiles_m * tiles_n)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if begin == end and not IS_FIRST:
        return

    # Tiles in the order of small squares, which share what they read in the cache.
    group = tile // (GROUP * tiles_n)
    in_group = min(tiles_m - group * GROUP, GROUP)
    place = tile % (GROUP * tiles_n)
    m = (group * GROUP + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    has_m, has_n = (m < height) | EVEN, (n < width) | EVEN

    at_grad = grad + begin.to(tl.int64) * height + k[:, None] * height + m[None, :]
    at_rows = rows + begin.to(tl.int64) * width + k[:, None] * width + n[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        is_row = (first + k < end)[:, None]
        a = tl.load(at_grad, mask=is_row & has_m[None, :], other=0.0)
        b = tl.load(at_rows, mask=is_row & has_n[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
        at_grad += BLOCK_K * height
        at_rows += BLOCK_K * width

    at = total + expert.to(tl.int64) * height * width + m[:, None] * width + n[None, :]
    mask = has_m[:, None] & has_n[None, :]
    if not IS_FIRST:
        sums += tl.load(at, mask=mask)
    tl.store(at, sums, mask=mask)
