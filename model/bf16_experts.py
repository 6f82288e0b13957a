"""The products of routed experts in bf16 where there is no QuACK: torch's, with kernels of our own between them."""

import torch
from torch import Tensor

from model.fused_experts import Backward, Matrices
from model.permute import Copies


class Plain:
    """Grouped products of rows of which each expert has `counts` [E], with passes over memory between them."""

    weighs_sums = True
    gradient_dtype: torch.dtype | None = None

    def __init__(self, copies: Copies, counts: Tensor) -> None:
        self._tokens, self._counts = copies.tokens, counts
        self._offsets = counts.cumsum(0, dtype=torch.int32)

    def forward(self, x: Tensor, weights: Tensor | None, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """gate_up [R, 2I], gates before ups, and results [R, D] of tokens x [T, D]."""
        from model.kernels.swiglu import swiglu

        gate_up_proj, down_proj = matrices
        gate_up = self._multiply(self._gather(x), gate_up_proj.mT)
        return gate_up, self._multiply(swiglu(gate_up, None), down_proj.mT)

    def backward(self, grad: Tensor, x: Tensor, gate_up: Tensor, weights: Tensor, matrices: Matrices) -> Backward:
        """From gradients of tokens [T, D], x [T, D], gate_up [R, 2I] and weights [R]."""
        from model.kernels.grouped import add_weight_gradients
        from model.kernels.swiglu import swiglu_backward

        gate_up_proj, down_proj = matrices
        # The gradient of what SwiGLU gave has no name, and is gone when this is done with it.
        grad_gate_up, grad_weights, inner = swiglu_backward(
            self._multiply(self._gather(grad), down_proj), gate_up, weights, with_result=True
        )
        assert inner is not None
        assert grad_weights is not None

        def add_gate_up(total: Tensor, *, is_first: bool) -> None:
            add_weight_gradients(total, grad_gate_up, self._gather(x), self._counts, is_first=is_first)

        def add_down(total: Tensor, *, is_first: bool) -> None:
            add_weight_gradients(total, self._gather(grad), inner, self._counts, is_first=is_first)

        return Backward(self._multiply(grad_gate_up, gate_up_proj), grad_weights, add_gate_up, add_down)

    def _gather(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._tokens)

    def _multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Rows [R, in] times the matrix [in, out] of their expert, [E, in, out]."""
        return torch._grouped_mm(rows, matrices, offs=self._offsets)
