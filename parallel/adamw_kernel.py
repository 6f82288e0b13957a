"""AdamW in one pass over memory, for GPUs.

Of every element an update has to read the gradient, the master weight and two moments, and to write back all but the
gradient, and the bf16 weight: 30 bytes with moments in fp32, 22 in bf16. The arithmetic takes less time than that
traffic, so what counts is to touch nothing twice: clipping is a factor here instead of a pass of its own, and the
weight is rounded while its master is at hand.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.optimizer import Coefficients

_BLOCK = 1024
# Elements that a thread may move at once if their number is known to be a multiple of it.
_TOGETHER = 16


@triton.jit
def _update(
    weights: tl.tensor, gradients: tl.tensor, means: tl.tensor, squares: tl.tensor, copies: tl.tensor,
    numel: tl.tensor, scale: tl.tensor, mean_share: tl.tensor, square_share: tl.tensor, kept: tl.tensor,
    rate: tl.tensor, square_scale: tl.tensor, eps: tl.tensor, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    # A flat group of parameters may have more elements than int32 counts.
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < numel
    gradient = tl.load(gradients + places, mask=is_there) * scale
    mean = tl.load(means + places, mask=is_there).to(tl.float32)
    square = tl.load(squares + places, mask=is_there).to(tl.float32)
    weight = tl.load(weights + places, mask=is_there)
    mean += mean_share * (gradient - mean)
    square += square_share * (gradient * gradient - square)
    weight = weight * kept - rate * mean / (tl.sqrt(square * square_scale) + eps)
    tl.store(means + places, mean.to(means.dtype.element_ty), mask=is_there)
    tl.store(squares + places, square.to(squares.dtype.element_ty), mask=is_there)
    tl.store(weights + places, weight, mask=is_there)
    if HAS_COPY:
        tl.store(copies + places, weight.to(copies.dtype.element_ty), mask=is_there)


def update(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    copies: Tensor | None,
    *,
    scale: float,
    coefficients: Coefficients,
) -> None:
    """Updates fp32 weights and their moments, fp32 or bf16, from fp32 gradients times `scale`, and writes the weights
    to `copies` too, in its dtype. All are contiguous, of one shape."""
    flat = [None if tensor is None else tensor.view(-1) for tensor in (weights, gradients, means, squares, copies)]
    numel = weights.numel()
    together = numel - numel % _TOGETHER
    if together:
        _launch(flat, together, scale, coefficients)
    if together < numel:
        rest = [None if tensor is None else tensor[together:] for tensor in flat]
        _launch(rest, numel - together, scale, coefficients)


def _launch(tensors: list[Tensor | None], numel: int, scale: float, coefficients: Coefficients) -> None:
    """The kernel on the first `numel` elements."""
    grid = (triton.cdiv(numel, _BLOCK),)
    _update[grid](*tensors, numel, scale, *coefficients, HAS_COPY=tensors[-1] is not None, BLOCK=_BLOCK)
