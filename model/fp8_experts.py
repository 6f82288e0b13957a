"""Routed experts in block FP8 on a GPU: all six products on codes, and all rounding on the way of what is moved anyway.

    forward     rows of tokens, gathered and rounded → gate_up → SwiGLU, weighted and rounded → results → sums by token
    backward    gradients of tokens, gathered and rounded in both directions → d inner → gradient of SwiGLU, rounded in
                both directions, and its result along tokens → d rows → sums by token; dW of both, which may wait

Kept are the tokens, gate_up and the routing. The numbers are those of `grouped_linear` with a quantizer: every operand
is rounded from the bf16 that it would be in memory.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.fp8 import Quantizer
from model.linear import WeightGradients
from model.packing import encode_rows, restore_rows
from model.permute import Copies, bring_back, pick

TILE = 128


def can_fuse(rows: Tensor, gate_up_proj: Tensor, quantizer: Quantizer) -> bool:
    """Whether experts with such a first matrix [E, 2I, D] run here: on a GPU, in "block", in bf16, in whole tiles. What
    the monitor is shown are whole operands, which are never in memory here."""
    inner, hidden = gate_up_proj.shape[1] // 2, gate_up_proj.shape[2]
    is_block = quantizer.config.recipe == "block" and not quantizer.shared.monitor.active
    return is_block and rows.is_cuda and rows.dtype == torch.bfloat16 and inner % TILE == hidden % TILE == 0


def fused_experts(
    x: Tensor,
    weights: Tensor,
    matrices: tuple[nn.Parameter, nn.Parameter],
    quantizers: tuple[Quantizer, Quantizer],
    copies: Copies,
    counts: Tensor,
    later: WeightGradients,
    *,
    packs: bool = False,
) -> Tensor:
    """The weighted sums of what experts with `matrices` [E, 2I, D] and [E, D, I] give: x [T, D], weights [T, K]. The
    rows of each expert, `counts` [E] of them, are `copies` of x in that order. With `packs` gate_up is kept in FP8."""
    packs = packs and torch.is_grad_enabled()
    result: Tensor = _FusedExperts.apply(x, weights, *matrices, quantizers, copies, counts, later, packs)
    return result


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        quantizers: tuple[Quantizer, Quantizer],
        copies: Copies,
        counts: Tensor,
        later: WeightGradients,
        packs: bool,
    ) -> Tensor:
        from model.kernels import fp8_grouped, fp8_quantize
        from model.kernels.permute import sum_rows

        power_of_two = quantizers[0].config.power_of_two
        first, second = (_codes(*pair) for pair in zip(quantizers, (gate_up_proj, down_proj), strict=True))
        row_weights = pick(weights, copies)
        rows = fp8_quantize.quantize_rows(x, counts, tokens=copies.tokens, power_of_two=power_of_two)
        gate_up = fp8_grouped.multiply_rows(rows, first[0], counts)
        inner = fp8_quantize.quantize_swiglu(gate_up, row_weights, counts, power_of_two=power_of_two)
        results = fp8_grouped.multiply_rows(inner, second[0], counts)
        ctx.save_for_backward(x, row_weights, counts, encode_rows(gate_up) if packs else gate_up)
        ctx.matrices, ctx.quantizers, ctx.copies, ctx.later = (gate_up_proj, down_proj), quantizers, copies, later
        return sum_rows(results, copies.slots, ())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from model.kernels import fp8_grouped, fp8_quantize
        from model.kernels.permute import sum_rows

        x, row_weights, counts, kept = ctx.saved_tensors
        gate_up = restore_rows(kept, ctx.matrices[0].shape[1], x.dtype)
        tokens, power_of_two = ctx.copies.tokens, ctx.quantizers[0].config.power_of_two
        first, second = (_codes(*pair) for pair in zip(ctx.quantizers, ctx.matrices, strict=True))
        of_rows, of_columns = fp8_quantize.quantize_both(
            grad.contiguous(), counts, tokens=tokens, power_of_two=power_of_two
        )
        grad_inner = fp8_grouped.multiply_rows(of_rows, second[1], counts)
        gate_up_rows, gate_up_columns, inner_columns, grad_weights = fp8_quantize.quantize_swiglu_backward(
            grad_inner, gate_up, row_weights, counts, power_of_two=power_of_two
        )
        grad_rows = fp8_grouped.multiply_rows(gate_up_rows, first[1], counts)

        def of_x() -> Any:
            return fp8_quantize.quantize_columns(x, counts, tokens=tokens, power_of_two=power_of_two)

        gradients: list[Tensor | None] = []
        for matrix, left, right in (
            (ctx.matrices[0], gate_up_columns, of_x),
            (ctx.matrices[1], of_columns, lambda: inner_columns),
        ):
            compute = partial(_weight_gradient, matrix, left, right, counts)
            if ctx.later.deferring:
                ctx.later.defer(matrix, compute)
                gradients.append(None)
            else:
                gradients.append(compute())
        slots = ctx.copies.slots
        return (
            sum_rows(grad_rows, slots, ()),
            bring_back(grad_weights, ctx.copies),
            *gradients,
            None,
            None,
            None,
            None,
            None,
        )


def _weight_gradient(matrix: Tensor, grad: Any, make_rows: Any, counts: Tensor) -> Tensor | None:
    """dyᵀ x of each expert; or None, when it has been added to the fp32 sum of the matrix."""
    from model.kernels.fp8_grouped import add_products_of_columns

    marked: Any = matrix
    total = getattr(matrix, "main_grad", None)
    if total is None:
        gradient = torch.empty(matrix.shape, device=matrix.device)
        add_products_of_columns(gradient, grad, make_rows(), counts, is_first=True)
        return gradient.to(matrix.dtype)
    is_first = getattr(matrix, "main_grad_is_old", False)
    add_products_of_columns(total, grad, make_rows(), counts, is_first=is_first)
    marked.main_grad_is_old = False
    return None


def _codes(quantizer: Quantizer, matrix: Tensor) -> Any:
    """Those of a matrix, and of it transposed."""
    known = quantizer.shared.known_weight(quantizer, observed=False)
    if known is None:
        from model.kernels.fp8_quantize import quantize_weights

        known = quantize_weights(matrix.detach(), power_of_two=quantizer.config.power_of_two)
        quantizer.shared.remember_weight(quantizer, known, observed=False)
    return known
