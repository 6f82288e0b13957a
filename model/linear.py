"""Matrix products whose weight gradient can wait.

The backward pass of y = x Wᵀ has two parts: dx = dy W, which the layers before it wait for, and dW = dyᵀ x, which only
the optimizer does. A zero-bubble schedule runs the second later, where a rank would otherwise be idle. While
`WeightGradients.deferring` is set, the products of this module leave dW there as work; otherwise autograd gets it at
once. Products in FP8 (`model.fp8`) keep their inputs as they are and round them again for dW.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.fp8 import SIZE_MULTIPLE, Part, Quantizer
from model.fp8_products import arithmetic, grouped_operand_dtype
from model.products import add_product

if TYPE_CHECKING:
    from model.recompute import Execution

Work = Callable[[], None]


class AddProduct(Protocol):
    """Adds a product to a total of its shape, or puts it there if it `is_first`."""

    def __call__(self, total: Tensor, /, *, is_first: bool) -> None: ...


class WeightGradients:
    """The weight gradients that one rank has yet to compute; a value that its layers share."""

    def __init__(self) -> None:
        self.deferring = False
        self._work: list[Work] = []

    def gradient(self, weight: nn.Parameter, compute: Callable[[], Tensor | None]) -> Tensor | None:
        """What autograd gets for `weight`: what `compute` gives; or None, when that is kept for later."""
        if not self.deferring:
            return compute()
        self._work.append(partial(_run, weight, compute))
        return None

    def take(self) -> list[Work]:
        """The work kept so far, which is the caller's to run, in order."""
        work, self._work = self._work, []
        return work


def has_sum(weight: Tensor) -> bool:
    """Whether gradients of a weight are added up in an fp32 sum, its `main_grad`."""
    return getattr(weight, "main_grad", None) is not None


def add_to_sum(weight: Tensor, add: AddProduct) -> None:
    """Adds to the fp32 sum of a weight. A sum `main_grad_is_old` is that of the step before, whose place the first
    gradient takes."""
    marked: Any = weight
    add(marked.main_grad, is_first=getattr(weight, "main_grad_is_old", False))
    marked.main_grad_is_old = False


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Adds to a parameter's gradient where autograd does not: to its fp32 sum if it has one."""
    if has_sum(parameter):
        add_to_sum(parameter, lambda total, *, is_first: total.copy_(gradient) if is_first else total.add_(gradient))
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@torch.no_grad()
def _run(weight: nn.Parameter, compute: Callable[[], Tensor | None]) -> None:
    gradient = compute()
    if gradient is not None:
        add_gradient(weight, gradient)


class Linear(nn.Module):
    """y = x Wᵀ: x [..., in] to [..., out]. `weight` [out, in] has the name and shape of `nn.Linear`'s. Its `part` of
    the network and its sizes say whether it is in FP8, by a `quantizer`, or high."""

    def __init__(self, in_features: int, out_features: int, execution: "Execution", part: Part) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.quantizer = execution.fp8.quantizer(part, in_features, out_features)
        self._weight_gradients = execution.weight_gradients

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """[..., in] to [..., out], or with `rows` to those outputs alone."""
        if self.quantizer is not None and _fits(x, rows):
            return self._in_fp8(x, rows, self.quantizer)
        if rows is not None:
            return F.linear(x, self.weight[rows])
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight)
        result: Tensor = _Linear.apply(x, self.weight, self._weight_gradients)
        return result

    def _in_fp8(self, x: Tensor, rows: slice | None, quantizer: Quantizer) -> Tensor:
        flat = x.flatten(0, -2)
        # The gradient of a slice goes through autograd, at once.
        weight = self.weight if rows is None else self.weight[rows]
        later = self._weight_gradients if rows is None else WeightGradients()
        if not torch.is_grad_enabled():
            out = _multiply_in_fp8(flat, weight, quantizer, observed=False)
        else:
            out = _Fp8Linear.apply(flat, weight, quantizer, later, len(weight) / len(self.weight))
        return out.unflatten(0, x.shape[:-1])


def _fits(x: Tensor, rows: slice | None) -> bool:
    """Whether there is anything to round, and the slice of a weight has a size that tensor cores can read."""
    return x.numel() > 0 and (rows is None or (rows.stop - rows.start) % SIZE_MULTIPLE == 0)


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
        compute = partial(_weight_gradient, ctx.weight, grad.flatten(0, -2), x.flatten(0, -2))
        return grad_x, ctx.weight_gradients.gradient(ctx.weight, compute), None


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """dyᵀ x; or None, when it has been added to the weight's fp32 sum."""
    if not _adds_itself(weight, x):
        return grad.t() @ x
    add_to_sum(weight, partial(add_product, a=grad.t(), b=x))
    return None


def _adds_itself(weight: Tensor, x: Tensor) -> bool:
    """Whether a product in bf16 can be added to an fp32 sum without being rounded and written first."""
    return x.is_cuda and x.dtype == torch.bfloat16 and has_sum(weight)


def _multiply_in_fp8(x: Tensor, weight: Tensor, quantizer: Quantizer, *, observed: bool, share: float = 1.0) -> Tensor:
    """x [T, in] Wᵀ. A slice of the weight, a `share` of it, counts as the whole, as other ranks have the others; and
    its input for that share, as they have the same."""
    products = arithmetic(x)
    rounded = products.round(quantizer, "activation", x, rows=True, columns=False, observed=observed, share=share)
    return products.forward(rounded, _rounded_weight(weight, quantizer, observed=observed, share=share), x.dtype)


def _rounded_weight(weight: Tensor, quantizer: Quantizer, *, observed: bool, share: float = 1.0) -> Any:
    known = quantizer.shared.known_weight(quantizer, observed=observed) if share == 1 else None
    if known is None:
        products = arithmetic(weight)
        share = 1 / share
        known = products.round(quantizer, "weight", weight, rows=True, columns=True, observed=observed, share=share)
        if share == 1:
            quantizer.shared.remember_weight(quantizer, known, observed=observed)
    return known


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantizer: Quantizer, weight_gradients: WeightGradients, share: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.quantizer, ctx.weight_gradients, ctx.share = weight, quantizer, weight_gradients, share
        return _multiply_in_fp8(x, weight, quantizer, observed=True, share=share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        products, quantizer = arithmetic(grad), ctx.quantizer
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        rounded = products.round(quantizer, "gradient", grad, rows=needs_x, columns=needs_weight, observed=needs_x)
        grad_x = None
        if needs_x:
            weight = _rounded_weight(ctx.weight, quantizer, observed=False, share=ctx.share)
            grad_x = products.input_gradient(rounded, weight, grad.dtype)
        if not needs_weight:
            return grad_x, None, None, None, None
        compute = partial(_fp8_weight_gradient, products.only_columns(rounded), x, ctx.weight, quantizer)
        return grad_x, ctx.weight_gradients.gradient(ctx.weight, compute), None, None, None


def _fp8_weight_gradient(grad: Any, x: Tensor, weight: Tensor, quantizer: Quantizer) -> Tensor | None:
    """dyᵀ x; or None, when it has been added to the weight's fp32 sum."""
    products = arithmetic(x)
    rounded = products.round(quantizer, "activation", x, rows=False, columns=True, observed=False)
    if not has_sum(weight):
        return products.weight_gradient(grad, rounded, weight.dtype)
    add_to_sum(weight, partial(products.add_weight_gradient, grad, rounded))
    return None


def grouped_linear(
    rows: Tensor,
    weight: nn.Parameter,
    counts: Tensor,
    weight_gradients: WeightGradients,
    quantizer: Quantizer | None = None,
) -> Tensor:
    """y = x Wᵀ with the weight of each row's expert: rows [R, in] ordered by expert, weight [E, out, in], counts [E] to
    [R, out]; in FP8 with a quantizer."""
    if quantizer is None:
        result: Tensor = _GroupedLinear.apply(rows, weight, counts, weight_gradients)
    else:
        observed = torch.is_grad_enabled()
        result = _Fp8GroupedLinear.apply(rows, weight, counts, weight_gradients, quantizer, observed)
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
        compute = partial(_add_grouped_weight_gradient, ctx.weight, grad, rows, counts)
        return grad_rows, ctx.weight_gradients.gradient(ctx.weight, compute), None, None


class _Fp8GroupedLinear(torch.autograd.Function):
    """The three grouped products on rounded operands. They are those of 16 bits: a kernel that multiplies the codes
    themselves belongs here."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: nn.Parameter,
        counts: Tensor,
        weight_gradients: WeightGradients,
        quantizer: Quantizer,
        observed: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, counts)
        ctx.weight, ctx.weight_gradients, ctx.quantizer = weight, weight_gradients, quantizer
        dtype = grouped_operand_dtype(quantizer, rows)
        x = quantizer.round("activation", rows, counts, columns=False, observed=observed).rows
        matrices = _rounded_experts(weight, quantizer, dtype, observed=observed)
        assert x is not None
        return _grouped_product(x.to(dtype), matrices.transpose(-2, -1), counts).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        rows, counts = ctx.saved_tensors
        quantizer, needs_weight = ctx.quantizer, ctx.needs_input_grad[1]
        dtype = grouped_operand_dtype(quantizer, grad)
        rounded = quantizer.round("gradient", grad, counts, columns=needs_weight, observed=True)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            matrices = _rounded_experts(ctx.weight, quantizer, dtype, observed=False)
            grad_rows = _grouped_product(rounded.rows.to(dtype), matrices, counts).to(grad.dtype)
        if not needs_weight:
            return grad_rows, None, None, None, None, None
        compute = partial(_fp8_grouped_weight_gradient, rounded.columns.to(dtype), rows, ctx.weight, counts, quantizer)
        return grad_rows, ctx.weight_gradients.gradient(ctx.weight, compute), None, None, None, None


def _rounded_experts(weight: Tensor, quantizer: Quantizer, dtype: torch.dtype, *, observed: bool) -> Tensor:
    known: Tensor | None = quantizer.shared.known_weight(quantizer, observed=observed)
    if known is None:
        values = quantizer.round("weight", weight, observed=observed).rows
        assert values is not None
        known = values.to(dtype)
        quantizer.shared.remember_weight(quantizer, known, observed=observed)
    return known


def _fp8_grouped_weight_gradient(
    grad: Tensor, rows: Tensor, weight: Tensor, counts: Tensor, quantizer: Quantizer
) -> Tensor:
    x = quantizer.round("activation", rows, counts, rows=False).columns
    assert x is not None
    gradient = _grouped_weight_gradient(grad, x.to(grad.dtype), counts)
    return gradient if hasattr(weight, "main_grad") else gradient.to(weight.dtype)


def _grouped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Rows [R, in] times the matrix [in, out] of their expert, [E, in, out]."""
    if not len(rows):
        return rows.new_zeros(0, matrices.shape[-1])
    if _has_grouped_kernel(rows):
        return torch._grouped_mm(rows, matrices, offs=counts.cumsum(0, dtype=torch.int32))
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _add_grouped_weight_gradient(weight: Tensor, grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor | None:
    """What `_grouped_weight_gradient` gives; or None, when it has been added to the weight's fp32 sum."""
    if not _adds_itself(weight, rows):
        return _grouped_weight_gradient(grad, rows, counts)
    from model.kernels.grouped import add_weight_gradients

    add_to_sum(weight, partial(add_weight_gradients, grad=grad, rows=rows, counts=counts))
    return None


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
