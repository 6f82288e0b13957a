"""Matrix products whose weight gradient can wait.

The backward pass of y = x Wᵀ has two parts: dx = dy W, which the layers before it wait for, and dW = dyᵀ x, which only
the optimizer does. A zero-bubble schedule runs the second later, where a rank would otherwise be idle. While
`WeightGradients.deferring` is set, the products of this module leave dW there as work; otherwise autograd gets it at
once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Work = Callable[[], None]


class WeightGradients:
    """The weight gradients that one rank has yet to compute; a value that its layers share."""

    def __init__(self) -> None:
        self.deferring = False
        self._work: list[Work] = []

    def defer(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Keeps the computation of a gradient of `weight` for later."""
        self._work.append(partial(_run, weight, compute))

    def take(self) -> list[Work]:
        """The work kept so far, which is the caller's to run, in order."""
        work, self._work = self._work, []
        return work


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Adds to a parameter's gradient where autograd does not: to its fp32 sum `main_grad` if it has one. A sum
    `main_grad_is_old` is that of the step before, whose place the first gradient takes."""
    marked: Any = parameter
    if getattr(parameter, "main_grad", None) is not None:
        if getattr(parameter, "main_grad_is_old", False):
            marked.main_grad.copy_(gradient)
            marked.main_grad_is_old = False
        else:
            marked.main_grad.add_(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@torch.no_grad()
def _run(weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
    add_gradient(weight, compute())


class Linear(nn.Module):
    """y = x Wᵀ: x [..., in] to [..., out]. `weight` [out, in] has the name and shape of `nn.Linear`'s."""

    def __init__(self, in_features: int, out_features: int, weight_gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self._weight_gradients = weight_gradients

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """[..., in] to [..., out], or with `rows` to those outputs alone."""
        if rows is not None:
            return F.linear(x, self.weight[rows])
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight)
        result: Tensor = _Linear.apply(x, self.weight, self._weight_gradients)
        return result


class _Linear(torch.autograd.Function):
    # The weight is an attribute: what save_for_backward returns inside a recomputation is an alias without gradient.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, weight_gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.weight_gradients = weight, weight_gradients
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        grad_x = grad @ ctx.weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        compute = partial(_weight_gradient, grad.flatten(0, -2), x.flatten(0, -2))
        if ctx.weight_gradients.deferring:
            ctx.weight_gradients.defer(ctx.weight, compute)
            return grad_x, None, None
        return grad_x, compute(), None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


def grouped_linear(rows: Tensor, weight: nn.Parameter, counts: Tensor, weight_gradients: WeightGradients) -> Tensor:
    """y = x Wᵀ with the weight of each row's expert: rows [R, in] ordered by expert, weight [E, out, in], counts [E] to
    [R, out]."""
    result: Tensor = _GroupedLinear.apply(rows, weight, counts, weight_gradients)
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: nn.Parameter, counts: Tensor, weight_gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(rows, counts)
        ctx.weight, ctx.weight_gradients = weight, weight_gradients
        return _grouped_product(rows, weight.transpose(-2, -1), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, counts = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = _grouped_product(grad, ctx.weight, counts) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None, None
        compute = partial(_grouped_weight_gradient, grad, rows, counts)
        if ctx.weight_gradients.deferring:
            ctx.weight_gradients.defer(ctx.weight, compute)
            return grad_rows, None, None, None
        return grad_rows, compute(), None, None


def _grouped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Rows [R, in] times the matrix [in, out] of their expert, [E, in, out]."""
    if not len(rows):
        return rows.new_zeros(0, matrices.shape[-1])
    if _has_grouped_kernel(rows):
        return torch._grouped_mm(rows, matrices, offs=counts.cumsum(0, dtype=torch.int32))
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _grouped_weight_gradient(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Σ over the rows of each expert of grad xᵀ: [R, out] and [R, in] to [E, out, in]."""
    if not len(rows):
        return rows.new_zeros(len(counts), grad.shape[1], rows.shape[1])
    if _has_grouped_kernel(rows):
        products = torch._grouped_mm(grad.t(), rows, offs=counts.cumsum(0, dtype=torch.int32))
        # What the kernel leaves where an expert has no rows is not zero on every device.
        return products.masked_fill_((counts == 0)[:, None, None], 0.0)
    sizes = counts.tolist()
    return torch.stack([g.t() @ x for g, x in zip(grad.split(sizes), rows.split(sizes), strict=True)])


def _has_grouped_kernel(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16
