"""Routed experts in bf16 on a GPU, in as few passes over memory as there are kernels for.

    forward     tokens, gathered → gate_up → SwiGLU → results → weighted sums by token
    backward    gradients of tokens, gathered → d inner → gradient of SwiGLU and its weighted result → d rows → sums by
                token; dW of both, which may wait

Kept are the tokens, gate_up and the routing. Weights are multiplied in fp32 with the results as they are summed. The
products are QuACK's, or where it is not installed torch's with kernels of our own between them.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model import quack
from model.linear import WeightGradients
from model.packing import encode_rows, restore_rows
from model.permute import Copies, bring_back, pick


class Products(Protocol):
    """The products of experts, as `model.quack.Quack` explains them. What `rows` gives is for its own products, and so
    is gate_up: whether gates come before ups or in turns with them is nobody else's business."""

    name: str

    def rows(self, copies: Copies, counts: Tensor) -> Any: ...

    def gate_up(self, x: Tensor, matrices: Tensor, rows: Any) -> tuple[Tensor, Tensor]: ...

    def down(self, inner: Tensor, matrices: Tensor, rows: Any) -> Tensor: ...

    def down_backward(
        self, grad: Tensor, matrices: Tensor, gate_up: Tensor, weights: Tensor, rows: Any
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def gate_up_backward(self, grad_gate_up: Tensor, matrices: Tensor, rows: Any) -> Tensor: ...

    def add_gate_up_gradient(
        self, total: Tensor, grad_gate_up: Tensor, x: Tensor, rows: Any, *, is_first: bool
    ) -> None: ...

    def add_down_gradient(self, total: Tensor, grad: Tensor, inner: Tensor, rows: Any, *, is_first: bool) -> None: ...


class Rows(NamedTuple):
    """Which token each row is a copy of, [R], how many each expert has, [E], and where they end, [E] int32."""

    tokens: Tensor
    counts: Tensor
    offsets: Tensor


class Plain:
    """torch's grouped products, with passes over memory between them."""

    name = "torch"

    def rows(self, copies: Copies, counts: Tensor) -> Rows:
        return Rows(copies.tokens, counts, counts.cumsum(0, dtype=torch.int32))

    def gate_up(self, x: Tensor, matrices: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        from model.kernels.swiglu import swiglu

        gate_up = torch._grouped_mm(x.index_select(0, rows.tokens), matrices.mT, offs=rows.offsets)
        return gate_up, swiglu(gate_up, None)

    def down(self, inner: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
        return torch._grouped_mm(inner, matrices.mT, offs=rows.offsets)

    def down_backward(
        self, grad: Tensor, matrices: Tensor, gate_up: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        from model.kernels.swiglu import swiglu_backward

        grad_inner = torch._grouped_mm(grad.index_select(0, rows.tokens), matrices, offs=rows.offsets)
        grad_gate_up, grad_weights, inner = swiglu_backward(grad_inner, gate_up, weights, with_result=True)
        assert inner is not None
        assert grad_weights is not None
        return grad_gate_up, inner, grad_weights

    def gate_up_backward(self, grad_gate_up: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
        return torch._grouped_mm(grad_gate_up, matrices, offs=rows.offsets)

    def add_gate_up_gradient(
        self, total: Tensor, grad_gate_up: Tensor, x: Tensor, rows: Rows, *, is_first: bool
    ) -> None:
        from model.kernels.grouped import add_weight_gradients

        add_weight_gradients(total, grad_gate_up, x.index_select(0, rows.tokens), rows.counts, is_first=is_first)

    def add_down_gradient(self, total: Tensor, grad: Tensor, inner: Tensor, rows: Rows, *, is_first: bool) -> None:
        from model.kernels.grouped import add_weight_gradients

        add_weight_gradients(total, grad.index_select(0, rows.tokens), inner, rows.counts, is_first=is_first)


def can_fuse(x: Tensor, copies: Copies, gate_up_proj: Tensor) -> bool:
    """Whether experts with such a first matrix [E, 2I, D] run here: on a GPU, in bf16, with any rows at all."""
    return x.is_cuda and x.dtype == gate_up_proj.dtype == torch.bfloat16 and len(copies.choices) > 0


def products_for(hidden: int, inner: int, *, beside: bool = False) -> Products:
    """Those that experts of such sizes are computed with on this GPU, which other kernels run `beside` or not."""
    fits = inner % quack.MULTIPLE == hidden % quack.MULTIPLE == 0
    return quack.Quack(beside=beside) if fits and quack.is_installed() else Plain()


def fused_experts(
    x: Tensor,
    weights: Tensor,
    matrices: tuple[nn.Parameter, nn.Parameter],
    copies: Copies,
    counts: Tensor,
    later: WeightGradients,
    *,
    packs: bool = False,
) -> Tensor:
    """The weighted sums of what experts with `matrices` [E, 2I, D] and [E, D, I] give: x [T, D], weights [T, K]. The
    rows of each expert, `counts` [E] of them, are `copies` of x in that order. With `packs` gate_up is kept in FP8."""
    packs = packs and torch.is_grad_enabled()
    result: Tensor = _FusedExperts.apply(x, weights, *matrices, copies, counts, later, packs)
    return result


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        copies: Copies,
        counts: Tensor,
        later: WeightGradients,
        packs: bool,
    ) -> Tensor:
        from model.kernels.permute import sum_rows

        # Where choices are missing, rows came from other ranks, and more are on their way meanwhile.
        products = products_for(*down_proj.shape[1:], beside=not copies.complete)
        rows = products.rows(copies, counts)
        gate_up, inner = products.gate_up(x, gate_up_proj, rows)
        results = products.down(inner, down_proj, rows)
        ctx.save_for_backward(x, weights, encode_rows(gate_up) if packs else gate_up)
        ctx.matrices, ctx.rows, ctx.copies, ctx.later = (gate_up_proj, down_proj), rows, copies, later
        ctx.products = products
        return sum_rows(results, copies.slots, (), weights=weights, num_rows=len(copies.choices))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from model.kernels.permute import sum_rows

        x, weights, kept = ctx.saved_tensors
        (first, second), rows, copies = ctx.matrices, ctx.rows, ctx.copies
        products, grad = ctx.products, grad.contiguous()
        row_weights = pick(weights, copies)
        gate_up = restore_rows(kept, first.shape[1], x.dtype)
        grad_gate_up, inner, grad_weights = products.down_backward(grad, second, gate_up, row_weights, rows)
        grad_rows = products.gate_up_backward(grad_gate_up, first, rows)
        gradients: list[Tensor | None] = []
        for matrix, add in (
            (first, partial(products.add_gate_up_gradient, grad_gate_up=grad_gate_up, x=x, rows=rows)),
            (second, partial(products.add_down_gradient, grad=grad, inner=inner, rows=rows)),
        ):
            compute = partial(_weight_gradient, matrix, add)
            if ctx.later.deferring:
                ctx.later.defer(matrix, compute)
                gradients.append(None)
            else:
                gradients.append(compute())
        of_x = sum_rows(grad_rows, copies.slots, (), num_rows=len(copies.choices))
        return of_x, bring_back(grad_weights, copies), *gradients, None, None, None, None


def _weight_gradient(matrix: Tensor, add: Any) -> Tensor | None:
    """The gradient of a matrix; or None, when it has been added to the matrix's fp32 sum."""
    total = getattr(matrix, "main_grad", None)
    if total is None:
        gradient = torch.empty_like(matrix)
        add(gradient, is_first=True)
        return gradient
    marked: Any = matrix
    add(total, is_first=getattr(matrix, "main_grad_is_old", False))
    marked.main_grad_is_old = False
    return None
