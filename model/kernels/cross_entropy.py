"""The loss of each token from its logits, which are overwritten with their gradient: one row of logits a program.

The first pass over a row finds its largest value m and the sum Σ exp(x − m); when m grows to m', what was summed so far
is multiplied by exp(m − m'). The second reads the row again, mostly from the cache, and writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 16384  # values of a row that a program holds


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
    block = min(triton.next_power_of_2(num_columns), PIECE)
    _kernel[(num_tokens,)](
        logits, labels, losses, logits.stride(0), scale,
        COLUMNS=num_columns, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=max(block // 1024, 4),
    )  # fmt: skip
    return losses


@triton.jit
def _kernel(
    logits: tl.tensor, labels: tl.tensor, losses: tl.tensor, row_stride: tl.tensor, scale: tl.tensor,
    COLUMNS: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    # Read before any of the row is overwritten: there are barriers in the reductions between.
    of_label = tl.load(logits + label, mask=(label >= 0) & (label < COLUMNS), other=float("nan")).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in range(0, COLUMNS, BLOCK):
        here = start + columns
        x = tl.load(logits + here, mask=here < COLUMNS, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    tl.store(losses + row, largest + tl.log(total) - of_label)
    if WITH_GRADIENT:
        for start in range(0, COLUMNS, BLOCK):
            here = start + columns
            x = tl.load(logits + here, mask=here < COLUMNS, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - largest) * (scale / total) - tl.where(here == label, scale, 0.0)
            tl.store(logits + here, gradient, mask=here < COLUMNS)
