"""The routed experts, and how tokens reach them.

A layer sees only a `Dispatcher`: `dispatch` brings rows to the experts that live here, ordered by expert, `combine`
takes the results back and sums them by weight. `LocalDispatcher` serves a process that holds all experts. No token is
dropped and no capacity is set.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.router import Route, count_load


@dataclass(frozen=True)
class Dispatched:
    """Rows [R, D] ordered by local expert, how many each local expert has ([E_local], int64), and what the dispatcher
    needs to bring them back."""

    rows: Tensor
    counts: Tensor
    ticket: Any


class Dispatcher(Protocol):
    """Carries tokens to experts and back."""

    def dispatch(self, x: Tensor, route: Route) -> Dispatched:
        """x [T, D] to rows in the order of the experts."""
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched, route: Route) -> Tensor:
        """Results [R, D] to the weighted sum of each token, [T, D]."""
        ...


class LocalDispatcher:
    """All experts are here: a permutation there, a permutation and a sum over K back."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, route: Route) -> Dispatched:
        """Sorts the T·K choices by expert, tokens of one expert staying in order."""
        order = route.experts.flatten().argsort(stable=True)
        rows: Tensor = _Permute.apply(x, order, route.experts.shape[1])
        return Dispatched(rows, count_load(route.experts, self.num_experts), order)

    def combine(self, rows: Tensor, dispatched: Dispatched, route: Route) -> Tensor:
        """Undoes the permutation and sums over K in the order of choice, in fp32."""
        choices: Tensor = _Permute.apply(rows, _inverse(dispatched.ticket), 1)
        weighted = choices.unflatten(0, route.weights.shape).float() * route.weights.unsqueeze(-1)
        return weighted.sum(1).to(rows.dtype)


class _Permute(torch.autograd.Function):
    """Row i of the result is token order[i] // K. The gradient is gathered and summed over K, so it needs no atomic
    additions and is the same in every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, num_choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_choices = num_choices
        return x.index_select(0, order // num_choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(order)).unflatten(0, (-1, ctx.num_choices)).sum(1), None, None


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) · W_up x), gate and up in one matrix: the dense MLP and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class GroupedExperts(nn.Module):
    """SwiGLU experts with stacked weights: `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]."""

    def __init__(self, config: ModelConfig, num_experts: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [R, D] ordered by expert, `counts` [E] of them each, to [R, D]."""
        return grouped_linear(swiglu(grouped_linear(rows, self.gate_up_proj, counts)), self.down_proj, counts)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for the concatenation [..., 2I]; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y = x Wᵀ with the weight of each row's expert: rows [R, in], weight [E, out, in], counts [E] to [R, out]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weight.transpose(-2, -1), offs=counts.cumsum(0, dtype=torch.int32))
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])
