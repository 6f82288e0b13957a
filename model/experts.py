"""The routed experts of a layer, the shared ones, and the dense MLP.

`RoutedExperts` works on rows with the experts chosen for each. Where experts are spread over processes, somebody else
brings the rows here and takes the results back; a choice that is not for an expert that lives here is −1. No token is
dropped and no capacity is set.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import quack
from model.bf16_experts import Plain
from model.config import ModelConfig
from model.fp8 import Fp8Config
from model.fp8_experts import TILE, BlockFp8
from model.fused_experts import Products, fused_experts
from model.linear import Linear, WeightGradients, grouped_linear
from model.packing import decode_rows, encode_rows, restore_rows
from model.permute import Copies, collect, pick, spread
from model.recompute import Execution


class RoutedRows(NamedTuple):
    """Rows [R, D] with the chosen experts [R, K], counted from the first that lives here (−1: none), and their weights
    [R, K] in fp32. `complete` says that no choice is −1; else `num_choices` of them are not, if that is known."""

    rows: Tensor
    experts: Tensor
    weights: Tensor
    complete: bool = True
    num_choices: int | None = None


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) · W_up x), gate and up in one matrix: the dense MLP and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, execution: Execution) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, execution, "mlp")
        self.down_proj = Linear(intermediate_size, hidden_size, execution, "mlp")
        self._execution = execution

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(_activate(self._execution, self.gate_up_proj(x)))


def fused_in(
    config: ModelConfig, dtype: torch.dtype, fp8: Fp8Config, *, watched: bool
) -> Literal["bf16", "fp8"] | None:
    """What routed experts on rows of a `dtype` are computed in by one function on a GPU; None if by one operation at a
    time. The monitor, if they are `watched` by it, is shown whole operands, which such a function has none of."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if dtype != torch.bfloat16:
        return None
    if not (fp8.takes("experts", hidden, 2 * inner) and fp8.takes("experts", inner, hidden)):
        return "bf16"
    return "fp8" if fp8.recipe == "block" and hidden % TILE == inner % TILE == 0 and not watched else None


class RoutedExperts(nn.Module):
    """SwiGLU experts with stacked weights: `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I], for the E experts that
    live here."""

    def __init__(self, config: ModelConfig, num_experts: int, execution: Execution) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.gate_up_quantizer = execution.fp8.quantizer("experts", hidden, 2 * inner, num_experts=num_experts)
        self.down_quantizer = execution.fp8.quantizer("experts", inner, hidden, num_experts=num_experts)
        self._config, self._execution = config, execution

    def forward(self, routed: RoutedRows, *, defers: bool = True) -> Tensor:
        """The weighted sum of each row's experts, [R, D], added up in fp32. As W_down is linear, weights may come
        before or after it."""
        execution, x, weights = self._execution, routed.rows, routed.weights
        later = execution.weight_gradients if defers else WeightGradients()
        copies, counts = sort_by_expert(routed, len(self.gate_up_proj))
        if products := self._products(x, copies, counts):
            matrices, packs = (self.gate_up_proj, self.down_proj), execution.packs_swiglu
            return fused_experts(x, weights, matrices, products, copies, later, packs=packs)
        rows = execution.recompute.again("expert_rows", partial(spread, copies=copies), x)
        gate_up = grouped_linear(rows, self.gate_up_proj, counts, later, self.gate_up_quantizer)
        inner = _activate(execution, gate_up, pick(weights, copies))
        return collect(grouped_linear(inner, self.down_proj, counts, later, self.down_quantizer), copies)

    def _products(self, x: Tensor, copies: Copies, counts: Tensor) -> Products | None:
        """Those of one function for all of it, if there is one for rows such as x [R, D] here."""
        fp8, first, second = self._execution.fp8, self.gate_up_quantizer, self.down_quantizer
        path = fused_in(self._config, x.dtype, fp8.config, watched=fp8.monitor.active) if x.is_cuda else None
        assert path is None or self.gate_up_proj.dtype == x.dtype, (self.gate_up_proj.dtype, x.dtype)
        if path == "fp8":
            assert first is not None
            assert second is not None
            return BlockFp8(copies, counts, (first, second))
        if path is None or not len(copies.choices):
            return None
        if quack.multiplies(self._config.hidden_size, self._config.moe_intermediate_size):
            # Where choices are missing, rows came from other ranks, and more are on their way meanwhile.
            return quack.Quack(copies, counts, beside=not copies.complete)
        return Plain(copies, counts)


def sort_by_expert(routed: RoutedRows, num_experts: int) -> tuple[Copies, Tensor]:
    """Where each choice of [R, K] stands among the choices ordered by expert, those of one expert in the order of rows,
    and how many each expert has, [num_experts] int64."""
    experts = routed.experts.flatten()
    if not routed.complete:
        experts = torch.where(experts < 0, num_experts, experts)
    places, order, counts = _count_and_place(experts, num_experts)
    num_here = experts.numel() if routed.complete else routed.num_choices
    if num_here is None:
        num_here = int(counts.sum())
    slots = places if routed.complete else places.clamp(max=num_here)
    return Copies(slots.view(routed.experts.shape), order[:num_here], routed.complete), counts


def _count_and_place(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of experts [N], 0 to num_experts (which is none of them): the place of each in their stable order, the order, and
    how often each expert comes."""
    if experts.is_cuda:
        from model.kernels.permute import count_and_place

        return count_and_place(experts, num_experts)
    counts = torch.bincount(experts, minlength=num_experts)[:num_experts]
    order = experts.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places, order, counts


def _activate(execution: Execution, gate_up: Tensor, *weights: Tensor) -> Tensor:
    """SwiGLU of [..., 2I], which keeps and computes again what the execution says."""
    if not (execution.packs_swiglu and torch.is_grad_enabled()):
        return execution.recompute.again("swiglu", swiglu, gate_up, *weights)
    packed = encode_rows(gate_up.detach().flatten(0, -2))
    inner: Tensor = _SwiGLU.apply(gate_up, *(weights or (None,)), packed)

    def again(packed: Tensor, *weights: Tensor) -> Tensor:
        rows = decode_rows(packed, gate_up_size[-1], inner_dtype)
        return swiglu(rows.view(gate_up_size), *weights)

    gate_up_size, inner_dtype = gate_up.shape, inner.dtype
    execution.recompute.remember("swiglu", inner, again, packed, *weights)
    return inner


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) · up for the concatenation [..., 2I], times a weight for each row [R] if there are any; returns
    [..., I], rounded once."""
    result: Tensor = _SwiGLU.apply(gate_up, weights, None)
    return result


class _SwiGLU(torch.autograd.Function):
    """Of a gate_up that comes with its packed rows, these are kept in its place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None, packed: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up if packed is None else packed, weights)
        ctx.size, ctx.dtype = gate_up.shape, gate_up.dtype
        if gate_up.is_cuda:
            from model.kernels import swiglu as kernels

            return kernels.swiglu(gate_up.flatten(0, -2), weights).unflatten(0, gate_up.shape[:-1])
        gate, up = gate_up.float().chunk(2, dim=-1)
        product = F.silu(gate) * up
        return (product if weights is None else product * weights.unsqueeze(-1)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weights = ctx.saved_tensors
        gate_up = restore_rows(kept, ctx.size[-1], ctx.dtype).view(ctx.size)
        if grad.is_cuda:
            from model.kernels import swiglu as kernels

            rows = grad.flatten(0, -2), gate_up.flatten(0, -2)
            grad_gate_up, grad_weights, _ = kernels.swiglu_backward(*rows, weights, with_result=False)
            return grad_gate_up.view(gate_up.shape), grad_weights, None
        gate, up = gate_up.float().chunk(2, dim=-1)
        share, wide = gate.sigmoid(), grad.float()
        silu = gate * share
        grad_weights = None
        if weights is not None:
            grad_weights = (wide * silu * up).sum(-1)
            wide = wide * weights.unsqueeze(-1)
        grad_gate = wide * up * (share + silu * (1 - share))
        return torch.cat((grad_gate, wide * silu), dim=-1).to(gate_up.dtype), grad_weights, None
