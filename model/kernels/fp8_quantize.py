"""Rounding of experts' rows to E4M3 in tiles of 1 × 128, in both directions from one reading.

The rules are those of `model.quantize`, to the bit. A program takes 128 rows of one expert and 128 columns, so a tile
along columns is one of its rows and a tile along rows one of its columns. What is summed over rows is also stored
transposed, each expert beginning a new tile (`model.kernels.fp8_grouped`). Rows may be copies of tokens, gathered on
the way; SwiGLU and its gradient are computed on the way too, and rounded to bf16 first, as they would be in memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.groups import find_tile

BLOCK = 128
_LARGEST = tl.constexpr(448.0)
_LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


class Codes(NamedTuple):
    """Codes with their factors: by rows [R, D] and [D/128, R], or along tokens [D, P] and [P/128, D]."""

    codes: Tensor
    scale_inv: Tensor


def quantize_rows(x: Tensor, counts: Tensor, *, tokens: Tensor, power_of_two: bool) -> Codes:
    """Codes by rows of the rows of x [T, D] in bf16 that `tokens` [R] names, ordered by expert, of which each has
    `counts` [E]. D is a multiple of 128."""
    codes = _empty_rows(len(tokens), x.shape[1], x.device)
    _quantize(x, counts, tokens, codes, None, power_of_two)
    return codes


def quantize_columns(x: Tensor, counts: Tensor, *, tokens: Tensor, power_of_two: bool) -> Codes:
    """Codes along tokens of the same."""
    codes = _empty_columns(len(tokens), len(counts), x.shape[1], x.device)
    _quantize(x, counts, tokens, None, codes, power_of_two)
    return codes


def quantize_both(x: Tensor, counts: Tensor, *, tokens: Tensor, power_of_two: bool) -> tuple[Codes, Codes]:
    """Both from one reading."""
    by_rows = _empty_rows(len(tokens), x.shape[1], x.device)
    along_tokens = _empty_columns(len(tokens), len(counts), x.shape[1], x.device)
    _quantize(x, counts, tokens, by_rows, along_tokens, power_of_two)
    return by_rows, along_tokens


def _quantize(
    x: Tensor, counts: Tensor, tokens: Tensor, by_rows: Codes | None, along_tokens: Codes | None, power_of_two: bool
) -> None:
    if len(tokens):
        _quantize_kernel[_grid(len(tokens), len(counts), x.shape[1])](
            x, tokens, counts, *(by_rows or (x, x)), *(along_tokens or (x, x)), len(tokens), x.shape[1],
            0 if along_tokens is None else along_tokens.codes.shape[1],
            ROWS=by_rows is not None, COLUMNS=along_tokens is not None,
            POWER_OF_TWO=power_of_two, **_constants(len(counts)),
        )  # fmt: skip


def quantize_swiglu(gate_up: Tensor, weights: Tensor, counts: Tensor, *, power_of_two: bool) -> Codes:
    """Codes by rows of weight · silu(gate) · up: gate_up [R, 2I] in bf16 and weights [R] in fp32 to [R, I]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    by_rows = _empty_rows(num_rows, size, gate_up.device)
    if num_rows:
        _swiglu_kernel[_grid(num_rows, len(counts), size)](
            gate_up, weights, counts, *by_rows, num_rows, size,
            POWER_OF_TWO=power_of_two, **_constants(len(counts)),
        )  # fmt: skip
    return by_rows


def quantize_swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, counts: Tensor, *, power_of_two: bool
) -> tuple[Codes, Codes, Codes, Tensor]:
    """From the gradient [R, I] in bf16: codes of the gradient of gate_up by rows and along tokens, codes of the forward
    result along tokens, and the gradient of the weights [R] in fp32."""
    num_rows, size = grad.shape
    by_rows = _empty_rows(num_rows, 2 * size, grad.device)
    along_tokens = _empty_columns(num_rows, len(counts), 2 * size, grad.device)
    result = _empty_columns(num_rows, len(counts), size, grad.device)
    shares = torch.empty(size // BLOCK, num_rows, device=grad.device)
    if num_rows:
        _swiglu_backward_kernel[_grid(num_rows, len(counts), size)](
            grad, gate_up, weights, counts, *by_rows, *along_tokens, *result, shares, num_rows, size,
            result.codes.shape[1], POWER_OF_TWO=power_of_two, **_constants(len(counts)),
        )  # fmt: skip
    return by_rows, along_tokens, result, shares.sum(0)


def quantize_weights(weights: Tensor, *, power_of_two: bool) -> tuple[Codes, Codes]:
    """Codes of the matrices of experts [E, N, K] in bf16 with a scale for each 128 × 128, and those transposed. N and K
    are multiples of 128."""
    num_experts, height, width = weights.shape
    assert height % BLOCK == width % BLOCK == 0, weights.shape
    device, blocks = weights.device, (height // BLOCK, width // BLOCK)
    codes = torch.empty_like(weights, dtype=torch.float8_e4m3fn)
    codes_t = torch.empty(num_experts, width, height, dtype=torch.float8_e4m3fn, device=device)
    scale_inv = torch.empty(num_experts, *blocks, device=device)
    scale_inv_t = torch.empty(num_experts, *reversed(blocks), device=device)
    _weights_kernel[(num_experts, *blocks)](
        weights, codes, scale_inv, codes_t, scale_inv_t, height, width,
        POWER_OF_TWO=power_of_two, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return Codes(codes, scale_inv), Codes(codes_t, scale_inv_t)


def _empty_rows(num_rows: int, size: int, device: torch.device) -> Codes:
    codes = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=device)
    return Codes(codes, torch.empty(size // BLOCK, num_rows, device=device))


def _empty_columns(num_rows: int, num_experts: int, size: int, device: torch.device) -> Codes:
    tiles = num_rows // BLOCK + num_experts
    codes = torch.empty(size, tiles * BLOCK, dtype=torch.float8_e4m3fn, device=device)
    return Codes(codes, torch.empty(tiles, size, device=device))


def _grid(num_rows: int, num_experts: int, size: int) -> tuple[int, int]:
    assert size % BLOCK == 0, size
    return num_rows // BLOCK + num_experts, size // BLOCK


def _constants(num_experts: int) -> dict[str, int]:
    block = triton.next_power_of_2(num_experts)
    return {"EXPERTS": num_experts, "EXPERTS_BLOCK": block, "BLOCK": BLOCK, "num_warps": 8}


@triton.jit
def divide(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    """Rounded as IEEE asks; `/` is not on a GPU, and is in the interpreter, of which not every version has `div_rn`."""
    return tl.div_rn(numerator, denominator) if _COMPILED else numerator / denominator


@triton.jit
def _scale(amax: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """`model.quantize.scale_of` for E4M3 from bf16."""
    scale = divide(_LARGEST + amax * 0.0, amax)
    scale = tl.where(scale == float("inf"), _LARGEST_BF16, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & _EXPONENT_BITS).to(tl.float32, bitcast=True)
    return tl.where((amax == 0) | (amax != amax) | (amax == float("inf")), 1.0, scale)


@triton.jit
def _encode(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return tl.clamp(x * scale, -_LARGEST, _LARGEST).to(tl.float8e4nv)


@triton.jit
def _store_rows(
    x: tl.tensor, codes: tl.tensor, scale_inv: tl.tensor, row: tl.tensor, is_row: tl.tensor, column: tl.tensor,
    block: tl.tensor, num_rows: tl.tensor, width: tl.tensor, POWER_OF_TWO: tl.constexpr,
) -> None:  # fmt: skip
    """Codes of x [128, 128] with a scale for each row; its columns are those of the given `block` of 128."""
    scale = _scale(tl.max(tl.abs(x), 1), POWER_OF_TWO)
    tl.store(codes + row[:, None] * width + column[None, :], _encode(x, scale[:, None]), mask=is_row[:, None])
    tl.store(scale_inv + block * num_rows + row, divide(1.0 + scale * 0.0, scale), mask=is_row)


@triton.jit
def _store_columns(
    x: tl.tensor, codes: tl.tensor, scale_inv: tl.tensor, place: tl.tensor, column: tl.tensor, tile: tl.tensor,
    num_places: tl.tensor, width: tl.tensor, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Codes of x [128, 128], transposed, with a scale for each column."""
    scale = _scale(tl.max(tl.abs(x), 0), POWER_OF_TWO)
    # Said to be whole tiles, so that stores are wide.
    at = codes + column.to(tl.int64)[:, None] * tl.multiple_of(num_places, BLOCK) + place[None, :]
    tl.store(at, tl.trans(_encode(x, scale[None, :])))
    tl.store(scale_inv + tile * width + column, divide(1.0 + scale * 0.0, scale))


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _quantize_kernel(
    x: tl.tensor, tokens: tl.tensor, counts: tl.tensor, codes: tl.tensor, scale_inv: tl.tensor,
    codes_t: tl.tensor, scale_inv_t: tl.tensor, num_rows: tl.tensor, size: tl.tensor, num_places: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    expert, begin, end, _ = find_tile(counts, tile, EXPERTS, EXPERTS_BLOCK, BLOCK)
    if expert >= EXPERTS:
        return
    row = begin.to(tl.int64) + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    is_row = row < end
    source = tl.load(tokens + row, mask=is_row, other=0)
    values = tl.load(x + source[:, None] * size + column[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    if ROWS:
        _store_rows(values, codes, scale_inv, row, is_row, column, block, num_rows, size, POWER_OF_TWO)
    if COLUMNS:
        place = tile * BLOCK + tl.arange(0, BLOCK)
        _store_columns(values, codes_t, scale_inv_t, place, column, tile, num_places, size, POWER_OF_TWO, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_kernel(
    gate_up: tl.tensor, weights: tl.tensor, counts: tl.tensor, codes: tl.tensor, scale_inv: tl.tensor,
    num_rows: tl.tensor, size: tl.tensor, POWER_OF_TWO: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    expert, begin, end, _ = find_tile(counts, tile, EXPERTS, EXPERTS_BLOCK, BLOCK)
    if expert >= EXPERTS:
        return
    row = begin.to(tl.int64) + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    is_row = row < end
    at = gate_up + row[:, None] * (2 * size) + column[None, :]
    gate = tl.load(at, mask=is_row[:, None], other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=is_row[:, None], other=0.0).to(tl.float32)
    weight = tl.load(weights + row, mask=is_row, other=0.0)
    result = (gate * tl.sigmoid(gate) * up * weight[:, None]).to(tl.bfloat16).to(tl.float32)
    _store_rows(result, codes, scale_inv, row, is_row, column, block, num_rows, size, POWER_OF_TWO)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _swiglu_backward_kernel(
    grad: tl.tensor, gate_up: tl.tensor, weights: tl.tensor, counts: tl.tensor,
    codes: tl.tensor, scale_inv: tl.tensor, codes_t: tl.tensor, scale_inv_t: tl.tensor,
    result_t: tl.tensor, result_scale_inv_t: tl.tensor, shares: tl.tensor,
    num_rows: tl.tensor, size: tl.tensor, num_places: tl.tensor, POWER_OF_TWO: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    expert, begin, end, _ = find_tile(counts, tile, EXPERTS, EXPERTS_BLOCK, BLOCK)
    if expert >= EXPERTS:
        return
    row = begin.to(tl.int64) + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    is_row = row < end
    at = gate_up + row[:, None] * (2 * size) + column[None, :]
    gate = tl.load(at, mask=is_row[:, None], other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=is_row[:, None], other=0.0).to(tl.float32)
    coming = tl.load(grad + row[:, None] * size + column[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    weight = tl.load(weights + row, mask=is_row, other=0.0)[:, None]
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(shares + block * num_rows + row, tl.sum(coming * silu * up, 1), mask=is_row)
    result = (silu * up * weight).to(tl.bfloat16).to(tl.float32)
    _store_columns(result, result_t, result_scale_inv_t, place, column, tile, num_places, size, POWER_OF_TWO, BLOCK)
    coming *= weight
    width = 2 * size
    of_gate = (coming * up * (share + silu * (1 - share))).to(tl.bfloat16).to(tl.float32)
    _store_rows(of_gate, codes, scale_inv, row, is_row, column, block, num_rows, width, POWER_OF_TWO)
    _store_columns(of_gate, codes_t, scale_inv_t, place, column, tile, num_places, width, POWER_OF_TWO, BLOCK)
    of_up = (coming * silu).to(tl.bfloat16).to(tl.float32)
    column, block = column + size, block + size // BLOCK
    _store_rows(of_up, codes, scale_inv, row, is_row, column, block, num_rows, width, POWER_OF_TWO)
    _store_columns(of_up, codes_t, scale_inv_t, place, column, tile, num_places, width, POWER_OF_TWO, BLOCK)


@triton.jit
def _weights_kernel(
    weights: tl.tensor, codes: tl.tensor, scale_inv: tl.tensor, codes_t: tl.tensor, scale_inv_t: tl.tensor,
    height: tl.tensor, width: tl.tensor, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    expert, m, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = m * BLOCK + tl.arange(0, BLOCK), n * BLOCK + tl.arange(0, BLOCK)
    first = expert.to(tl.int64) * height * width
    values = tl.load(weights + first + row[:, None] * width + column[None, :]).to(tl.float32)
    scale = _scale(tl.max(tl.max(tl.abs(values), 1), 0), POWER_OF_TWO)
    rounded = _encode(values, scale)
    tl.store(codes + first + row[:, None] * width + column[None, :], rounded)
    tl.store(codes_t + first + column[None, :] * height + row[:, None], rounded)
    blocks_m, blocks_n = height // BLOCK, width // BLOCK
    inverse = divide(1.0 + scale * 0.0, scale)
    tl.store(scale_inv + (expert * blocks_m + m) * blocks_n + n, inverse)
    tl.store(scale_inv_t + (expert * blocks_n + n) * blocks_m + m, inverse)
