"""The loss of each token from its logits, which are overwritten with their gradient: one row of logits a program.

Rows up to `_LARGEST_ROW` wide stay in registers, so that logits are read once and written once. Wider ones are read
again, mostly from the cache, after the pass that finds their largest value and the sum

    Σ exp(x − m),    m the largest value so far; when m grows to m', what was summed is multiplied by exp(m − m').
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_ROW = 65536
_PIECE = 8192


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label] in fp32, [T, V] and [T] to [T]; NaN for a label that is none."""
    return _launch(logits, labels, 1.0, with_gradient=False)


def losses_and_gradient(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The same; logits become (softmax − onehot) · scale."""
    return _launch(logits, labels, scale, with_gradient=True)


def _launch(logits: Tensor, labels: Tensor, scale: float, *, with_gradient: bool) -> Tensor:
    num_tokens, num_columns = logits.shape
    assert logits.stride(1) == 1
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    fits = num_columns <= _LARGEST_ROW
    block = triton.next_power_of_2(num_columns) if fits else _PIECE
    num_warps = min(max(block // 2048, 4), 32)
    _kernel[(num_tokens,)](
        logits, labels, losses, logits.stride(0), scale,
        COLUMNS=num_columns, FITS=fits, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return losses


@triton.jit
def _kernel(
    logits: tl.tensor, labels: tl.tensor, losses: tl.tensor, row_stride: tl.tensor, scale: tl.tensor,
    COLUMNS: tl.constexpr, FITS: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    # Read before any of the row is overwritten: there are barriers in the reductions between.
    of_label = tl.load(logits + label, mask=(label >= 0) & (label < COLUMNS), other=float("nan")).to(tl.float32)
    if FITS:
        x = tl.load(logits + columns, mask=columns < COLUMNS, other=-float("inf")).to(tl.float32)
        largest = tl.max(x, axis=0)
        powers = tl.exp(x - largest)
        total = tl.sum(powers, axis=0)
        if WITH_GRADIENT:
            gradient = powers * (scale / total) - tl.where(columns == label, scale, 0.0)
            tl.store(logits + columns, gradient, mask=columns < COLUMNS)
    else:
        largest = -float("inf")
        total = 0.0
        for start in range(0, COLUMNS, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < COLUMNS, other=-float("inf"))
            x = x.to(tl.float32)
            larger = tl.maximum(largest, tl.max(x, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
            largest = larger
        if WITH_GRADIENT:
            for start in range(0, COLUMNS, BLOCK):
                here = start + columns
                x = tl.load(logits + here, mask=here < COLUMNS, other=-float("inf")).to(tl.float32)
                gradient = tl.exp(x - largest) * (scale / total) - tl.where(here == label, scale, 0.0)
                tl.store(logits + here, gradient, mask=here < COLUMNS)
    tl.store(losses + row, largest + tl.log(total) - of_label)
