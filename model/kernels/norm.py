"""RMSNorm, alone and with the addition that comes before it, and its gradient, each in one pass over memory.

    y = w · x̂,  x̂ = x · rstd,  rstd = 1/√(mean(x²) + ε)
    dx = rstd · (h − x̂ · mean(h · x̂)),  h = w · dy;     dw = Σ over rows of dy · x̂

All in fp32, rounded once where stored. A row lies in the registers of one program. For dw every program adds up the
rows that it sees and a second sum runs over the programs, in an order that is the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # values of a tensor that a program holds at a time, where rows are shorter than that
MAX_PROGRAMS = 264  # of the gradient: two on each of 132 multiprocessors
PREFETCHED_BYTES = 2**14  # longest rows of which the gradient asks for two ahead, so that they fit in shared memory


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [N, D] and rstd [N] in fp32 of x [N, D], whose rows may lie apart."""
    y, rstd, _ = _normalise(x, None, weight, eps)
    return y, rstd


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The residual x + update, rounded, with y and rstd of what was rounded; [N, D], [N, D] and [N]. Rows of both may
    lie apart."""
    y, rstd, residual = _normalise(x, update, weight, eps)
    return residual, y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, D], with `grad_residual` added, and of weight [D], in fp32. Rows of grad, x and grad_residual
    may lie apart."""
    num_rows, size = x.shape
    rows, block, num_warps = _tile(size)
    num_programs = min(triton.cdiv(num_rows, rows), MAX_PROGRAMS)
    grad_x = x.new_empty(num_rows, size)
    if num_rows == 0:
        return grad_x, torch.zeros(size, dtype=torch.float32, device=x.device)
    grad, x = (_with_dense_rows(each) for each in (grad, x))
    added = grad if grad_residual is None else _with_dense_rows(grad_residual)
    stages = 3 if block * x.element_size() <= PREFETCHED_BYTES else 2
    sums = torch.empty(num_programs, size, dtype=torch.float32, device=x.device)
    _backward_kernel[(num_programs,)](
        grad, x, weight, rstd, added, grad_x, sums, num_rows, grad.stride(0), x.stride(0), added.stride(0),
        SIZE=size, ADDS=grad_residual is not None, STAGES=stages, ROWS=rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    grad_weight = torch.empty_like(sums[0])
    _sum_kernel[(triton.cdiv(size, 16),)](sums, grad_weight, num_programs, SIZE=size, ROWS=128, BLOCK=16, num_warps=8)
    return grad_x, grad_weight


def _normalise(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, rstd, and the sum where there is an update (else y once more)."""
    num_rows, size = x.shape
    rows, block, num_warps = _tile(size)
    y = x.new_empty(num_rows, size)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    residual = y if update is None else torch.empty_like(y)
    if num_rows:
        x = _with_dense_rows(x)
        added = x if update is None else _with_dense_rows(update)
        _forward_kernel[(triton.cdiv(num_rows, rows),)](
            x, added, weight, residual, y, rstd, num_rows, x.stride(0), added.stride(0), eps,
            SIZE=size, ADDS=update is not None, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return y, rstd, residual


def _tile(size: int) -> tuple[int, int, int]:
    """Rows of a program, their length as a power of two, and warps that share them."""
    block = triton.next_power_of_2(size)
    return max(TILE // block, 1), block, min(max(block // 512, 4), 16)


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x: tl.tensor, update: tl.tensor, weight: tl.tensor, residual: tl.tensor, y: tl.tensor, rstd: tl.tensor,
    num_rows: tl.tensor, x_stride: tl.tensor, update_stride: tl.tensor, eps: tl.tensor,
    SIZE: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    out = row[:, None] * SIZE + column[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(update + row[:, None] * update_stride + column[None, :], mask=mask, other=0.0)
        rounded = (value + added.to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + out, rounded, mask=mask)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)
    tl.store(rstd + row, factor, mask=row < num_rows)
    scale = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(y + out, value * factor[:, None] * scale[None, :], mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, rstd: tl.tensor, added: tl.tensor, grad_x: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor, grad_stride: tl.tensor, x_stride: tl.tensor, added_stride: tl.tensor,
    SIZE: tl.constexpr, ADDS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
        dy = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(rstd + row, mask=row < num_rows, other=0.0)
        if ADDS:
            other = tl.load(added + row[:, None] * added_stride + column[None, :], mask=mask, other=0.0)
        normal = value * factor[:, None]
        total += dy * normal
        inner = dy * scale[None, :]
        mean = tl.sum(inner * normal, axis=1) / SIZE
        result = (inner - normal * mean[:, None]) * factor[:, None]
        if ADDS:
            result += other.to(tl.float32)
        tl.store(grad_x + row[:, None] * SIZE + column[None, :], result, mask=mask)
    tl.store(sums + tl.program_id(0) * SIZE + column, tl.sum(total, axis=0), mask=column < SIZE)


@triton.jit(do_not_specialize=["num_sums"])
def _sum_kernel(
    sums: tl.tensor, result: tl.tensor, num_sums: tl.tensor,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, num_sums, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_sums)[:, None] & (column < SIZE)[None, :]
        total += tl.load(sums + row[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    tl.store(result + column, tl.sum(total, axis=0), mask=column < SIZE)
