"""Routed experts on a GPU in one function of autograd, in as few passes over memory as there are kernels for.

    forward     tokens, gathered → gate_up → SwiGLU → results → weighted sums by token
    backward    gradients of tokens, gathered → d inner → gradient of SwiGLU and its weighted result → d rows → sums by
                token; dW of both, which may wait

Kept are the tokens, gate_up and the routing. The products are in bf16, QuACK's (`model.quack`) or torch's
(`model.bf16_experts`), or in block FP8 (`model.fp8_experts`).
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.linear import AddProduct, WeightGradients, add_to_sum, has_sum
from model.packing import encode_rows, restore_rows
from model.permute import Copies, bring_back, pick

Matrices = tuple[nn.Parameter, nn.Parameter]


class Backward(NamedTuple):
    """The gradients of rows [R, D] and, in fp32, of their weights [R]; and what adds dW of [E, 2I, D] and [E, D, I]."""

    rows: Tensor
    weights: Tensor
    add_gate_up: AddProduct
    add_down: AddProduct


class Products(Protocol):
    """The products of experts with their R rows, which are copies of tokens [T, D] ordered by expert. Matrices are
    [E, 2I, D] and [E, D, I]. Whether in gate_up gates come before ups or in turns with them is nobody else's business.

    Where `weighs_sums`, results are multiplied by the rows' weights in fp32 as they are summed; else SwiGLU's are.
    Gradients that have no fp32 sum to be added to are written as `gradient_dtype`; None is that of the matrix.
    """

    weighs_sums: bool
    gradient_dtype: torch.dtype | None

    def forward(self, x: Tensor, weights: Tensor | None, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """gate_up [R, 2I] and results [R, D] of tokens x [T, D] and weights [R], None where they weigh sums. Both may
        be filled up with rows that are nobody's."""

    def backward(self, grad: Tensor, x: Tensor, gate_up: Tensor, weights: Tensor, matrices: Matrices) -> Backward:
        """From gradients of tokens [T, D], what `forward` was given and gave, and the weights [R] in any case."""


def fused_experts(
    x: Tensor,
    weights: Tensor,
    matrices: Matrices,
    products: Products,
    copies: Copies,
    later: WeightGradients,
    *,
    packs: bool = False,
) -> Tensor:
    """The weighted sums of what experts with `matrices` [E, 2I, D] and [E, D, I] give: x [T, D], weights [T, K]. The
    rows of the `products` are `copies` of x. With `packs` gate_up is kept in FP8."""
    packs = packs and torch.is_grad_enabled()
    result: Tensor = _FusedExperts.apply(x, weights, *matrices, products, copies, later, packs)
    return result


class _FusedExperts(torch.autograd.Function):
    # Matrices are attributes, as what has `main_grad` is the parameter itself.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        products: Products,
        copies: Copies,
        later: WeightGradients,
        packs: bool,
    ) -> Tensor:
        from model.kernels.permute import sum_rows

        matrices = gate_up_proj, down_proj
        of_sums, of_rows = (weights, None) if products.weighs_sums else (None, pick(weights, copies))
        gate_up, results = products.forward(x, of_rows, matrices)
        kept_weights = weights if of_rows is None else of_rows
        ctx.save_for_backward(x, kept_weights, encode_rows(gate_up) if packs else gate_up)
        ctx.matrices, ctx.products, ctx.copies, ctx.later = matrices, products, copies, later
        return sum_rows(results, copies.slots, (), weights=of_sums, num_rows=len(copies.choices))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from model.kernels.permute import sum_rows

        x, weights, kept = ctx.saved_tensors
        matrices, products, copies = ctx.matrices, ctx.products, ctx.copies
        if products.weighs_sums:
            weights = pick(weights, copies)
        gate_up = restore_rows(kept, matrices[0].shape[1], x.dtype)
        found = products.backward(grad.contiguous(), x, gate_up, weights, matrices)
        gradients = [
            ctx.later.gradient(matrix, partial(_weight_gradient, matrix, add, products.gradient_dtype))
            for matrix, add in zip(matrices, (found.add_gate_up, found.add_down), strict=True)
        ]
        of_x = sum_rows(found.rows, copies.slots, (), num_rows=len(copies.choices))
        return of_x, bring_back(found.weights, copies), *gradients, None, None, None, None


def _weight_gradient(matrix: nn.Parameter, add: AddProduct, dtype: torch.dtype | None) -> Tensor | None:
    """The gradient of a matrix; or None, when it has been added to the matrix's fp32 sum."""
    if has_sum(matrix):
        add_to_sum(matrix, add)
        return None
    gradient = torch.empty_like(matrix, dtype=dtype)
    add(gradient, is_first=True)
    return gradient.to(matrix.dtype)
