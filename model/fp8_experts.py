"""The products of routed experts in block FP8: all six on codes, and all rounding on the way of what is moved anyway.

    forward     rows of tokens, gathered and rounded → gate_up → SwiGLU, weighted and rounded → results
    backward    gradients of tokens, gathered and rounded in both directions → d inner → gradient of SwiGLU, rounded in
                both directions, and its result along tokens → d rows; dW of both

The numbers are those of `grouped_linear` with a quantizer: every operand is rounded from the bf16 that it would be in
memory.
"""

from typing import Any

import torch
from torch import Tensor

from model.fp8 import Quantizer
from model.fused_experts import Backward, Matrices
from model.permute import Copies

TILE = 128


class BlockFp8:
    """Those of rows of which each expert has `counts` [E], with matrices rounded by a quantizer each."""

    weighs_sums = False
    gradient_dtype: torch.dtype | None = torch.float32

    def __init__(self, copies: Copies, counts: Tensor, quantizers: tuple[Quantizer, Quantizer]) -> None:
        self._tokens, self._counts, self._quantizers = copies.tokens, counts, quantizers
        self._power_of_two = quantizers[0].config.power_of_two

    def forward(self, x: Tensor, weights: Tensor | None, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """gate_up [R, 2I], gates before ups, and results [R, D] of tokens x [T, D] and weights [R]."""
        from model.kernels.fp8_grouped import multiply_rows
        from model.kernels.fp8_quantize import quantize_rows, quantize_swiglu

        assert weights is not None
        counts, power_of_two = self._counts, self._power_of_two
        first, second = map(_codes, self._quantizers, matrices)
        rows = quantize_rows(x, counts, tokens=self._tokens, power_of_two=power_of_two)
        gate_up = multiply_rows(rows, first[0], counts)
        inner = quantize_swiglu(gate_up, weights, counts, power_of_two=power_of_two)
        return gate_up, multiply_rows(inner, second[0], counts)

    def backward(self, grad: Tensor, x: Tensor, gate_up: Tensor, weights: Tensor, matrices: Matrices) -> Backward:
        """From gradients of tokens [T, D], x [T, D], gate_up [R, 2I] and weights [R]."""
        from model.kernels.fp8_grouped import add_products_of_columns, multiply_rows
        from model.kernels.fp8_quantize import quantize_both, quantize_columns, quantize_swiglu_backward

        tokens, counts, power_of_two = self._tokens, self._counts, self._power_of_two
        first, second = map(_codes, self._quantizers, matrices)
        grad_rows, grad_columns = quantize_both(grad, counts, tokens=tokens, power_of_two=power_of_two)
        grad_inner = multiply_rows(grad_rows, second[1], counts)
        gate_up_rows, gate_up_columns, inner_columns, grad_weights = quantize_swiglu_backward(
            grad_inner, gate_up, weights, counts, power_of_two=power_of_two
        )

        def add_gate_up(total: Tensor, *, is_first: bool) -> None:
            x_columns = quantize_columns(x, counts, tokens=tokens, power_of_two=power_of_two)
            add_products_of_columns(total, gate_up_columns, x_columns, counts, is_first=is_first)

        def add_down(total: Tensor, *, is_first: bool) -> None:
            add_products_of_columns(total, grad_columns, inner_columns, counts, is_first=is_first)

        return Backward(multiply_rows(gate_up_rows, first[1], counts), grad_weights, add_gate_up, add_down)


def _codes(quantizer: Quantizer, matrix: Tensor) -> Any:
    """Those of a matrix, and of it transposed."""
    known = quantizer.shared.known_weight(quantizer, observed=False)
    if known is None:
        from model.kernels.fp8_quantize import quantize_weights

        known = quantize_weights(matrix.detach(), power_of_two=quantizer.config.power_of_two)
        quantizer.shared.remember_weight(quantizer, known, observed=False)
    return known
