"""The products of a layer on operands in FP8: on a CPU from the values of their codes, on a GPU by its tensor cores.

Both give the same sums of the same products, in another order. Operands are whatever `round` of the same arithmetic
gives.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from model.fp8 import Kind, Quantizer, Rounded


class Arithmetic(Protocol):
    """How a device rounds and multiplies. Matrices: x [T, in], weight [out, in], gradients dy [T, out]."""

    def round(
        self,
        quantizer: Quantizer,
        kind: Kind,
        x: Tensor,
        *,
        rows: bool,
        columns: bool,
        observed: bool,
        share: float = 1.0,
    ) -> Any:
        """An operand from a matrix, to be summed over its last dimension (`rows`), the other (`columns`), or either."""

    def only_columns(self, operand: Any) -> Any:
        """The same without what is summed over rows."""

    def forward(self, x: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        """x Wᵀ, [T, out]."""

    def input_gradient(self, grad: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        """dy W, [T, in]."""

    def weight_gradient(self, grad: Any, x: Any, dtype: torch.dtype) -> Tensor:
        """dyᵀ x, [out, in]."""

    def add_weight_gradient(self, grad: Any, x: Any, total: Tensor, *, is_first: bool) -> None:
        """Adds it in fp32 to a total, or puts it there if it `is_first`."""


class Reference:
    """Every product in fp32 from the values of the codes. Products of two are exact, so only their sum is rounded."""

    def round(
        self,
        quantizer: Quantizer,
        kind: Kind,
        x: Tensor,
        *,
        rows: bool,
        columns: bool,
        observed: bool,
        share: float = 1.0,
    ) -> Rounded:
        """As `Quantizer.round`."""
        return quantizer.round(kind, x, rows=rows, columns=columns, observed=observed, share=share)

    def only_columns(self, operand: Rounded) -> Rounded:
        """The same without what is summed over rows."""
        return Rounded(None, operand.columns)

    def forward(self, x: Rounded, weight: Rounded, dtype: torch.dtype) -> Tensor:
        """x Wᵀ, [T, out]."""
        assert x.rows is not None
        assert weight.rows is not None
        return (x.rows @ weight.rows.t()).to(dtype)

    def input_gradient(self, grad: Rounded, weight: Rounded, dtype: torch.dtype) -> Tensor:
        """dy W, [T, in]."""
        assert grad.rows is not None
        assert weight.columns is not None
        return (grad.rows @ weight.columns).to(dtype)

    def weight_gradient(self, grad: Rounded, x: Rounded, dtype: torch.dtype) -> Tensor:
        """dyᵀ x, [out, in]."""
        assert grad.columns is not None
        assert x.columns is not None
        return (grad.columns.t() @ x.columns).to(dtype)

    def add_weight_gradient(self, grad: Rounded, x: Rounded, total: Tensor, *, is_first: bool) -> None:
        """Adds it in fp32 to a total, or puts it there if it `is_first`."""
        product = self.weight_gradient(grad, x, torch.float32)
        if is_first:
            total.copy_(product)
        else:
            total += product


REFERENCE = Reference()


def arithmetic(x: Tensor) -> Arithmetic:
    """That of the device where x is."""
    if not x.is_cuda:
        return REFERENCE
    from model.te import TENSOR_CORES

    return TENSOR_CORES


def grouped_operand_dtype(quantizer: Quantizer, x: Tensor) -> torch.dtype:
    """What the values of codes are held in for products of experts on x's device. A code times a power of two is a bf16
    number as it is, and in bf16 there is a fast kernel."""
    is_exact = quantizer.config.recipe == "block" and quantizer.config.power_of_two
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 and is_exact else torch.float32
