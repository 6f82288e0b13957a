"""weight · silu(gate) · up, and its gradient, each in one pass over memory.

With s = sigmoid(g) and silu(g) = g · s:   d silu/dg = s · (1 + g · (1 − s)).

The gradient can give the result too, so that a layer need not keep it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # values of each tensor that a program holds at a time


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """[R, 2I], the gates before the ups, to [R, I], each row times its weight of `weights` [R] in fp32."""
    num_rows, size = _shape(gate_up)
    result = gate_up.new_empty(num_rows, size)
    if num_rows:
        rows, block = _tile(size)
        _forward_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(size, block))](
            gate_up, gate_up if weights is None else weights, result, num_rows,
            SIZE=size, WEIGHTED=weights is not None, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return result


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None, *, with_result: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of gate_up [R, 2I] and of weights [R], in fp32, from `grad` [R, I]; and what `swiglu` returned, [R, I],
    if asked for."""
    num_rows, size = _shape(gate_up)
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = None if weights is None else torch.empty_like(weights)
    result = gate_up.new_empty(num_rows, size) if with_result else None
    if num_rows:
        rows, block = _tile(size)
        span = block if weights is None else size
        _backward_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(size, span))](
            grad.contiguous(), gate_up,
            gate_up if weights is None else weights, grad_gate_up,
            gate_up if grad_weights is None else grad_weights, grad_gate_up if result is None else result,
            num_rows, SIZE=size, SPAN=span, WEIGHTED=weights is not None, WITH_RESULT=with_result,
            ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return grad_gate_up, grad_weights, result


def _shape(gate_up: Tensor) -> tuple[int, int]:
    assert gate_up.is_contiguous(), gate_up.stride()
    return gate_up.shape[0], gate_up.shape[1] // 2


def _tile(size: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block = min(triton.next_power_of_2(size), TILE)
    return TILE // block, block


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gate_up: tl.tensor, weights: tl.tensor, result: tl.tensor, num_rows: tl.tensor,
    SIZE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    place = gate_up + row[:, None] * (2 * SIZE) + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + SIZE, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(weights + row, mask=row < num_rows, other=0.0)[:, None]
    tl.store(result + row[:, None] * SIZE + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad: tl.tensor, gate_up: tl.tensor, weights: tl.tensor, grad_gate_up: tl.tensor, grad_weights: tl.tensor,
    result: tl.tensor, num_rows: tl.tensor,
    SIZE: tl.constexpr, SPAN: tl.constexpr, WEIGHTED: tl.constexpr, WITH_RESULT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + row, mask=row < num_rows, other=0.0)[:, None]
    for start in range(0, SPAN, BLOCK):
        column = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK)
        mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
        wide = row[:, None] * (2 * SIZE) + column[None, :]
        narrow = row[:, None] * SIZE + column[None, :]
        dy = tl.load(grad + narrow, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + wide, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + wide + SIZE, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        value = silu * up
        if WEIGHTED:
            total += dy * value
            value *= weight
            dy *= weight
        if WITH_RESULT:
            tl.store(result + narrow, value, mask=mask)
        tl.store(grad_gate_up + wide, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
        tl.store(grad_gate_up + wide + SIZE, dy * silu, mask=mask)
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(total, axis=1), mask=row < num_rows)
