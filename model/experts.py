"""The routed experts of a layer, the shared ones, and the dense MLP.

`RoutedExperts` works on rows with the experts chosen for each. Where experts are spread over processes, somebody else
brings the rows here and takes the results back; a choice that is not for an expert that lives here is −1. No token is
dropped and no capacity is set.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.linear import Linear, WeightGradients, grouped_linear
from model.permute import Copies, by_token, spread
from model.recompute import Execution


class RoutedRows(NamedTuple):
    """Rows [R, D] with the chosen experts [R, K], counted from the first that lives here (−1: none), and their weights
    [R, K] in fp32. `complete` says that no choice is −1."""

    rows: Tensor
    experts: Tensor
    weights: Tensor
    complete: bool = True


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) · W_up x), gate and up in one matrix: the dense MLP and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, execution: Execution) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, execution.weight_gradients)
        self.down_proj = Linear(intermediate_size, hidden_size, execution.weight_gradients)
        self._recompute = execution.recompute

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self._recompute.again("swiglu", swiglu, self.gate_up_proj(x)))


class RoutedExperts(nn.Module):
    """SwiGLU experts with stacked weights: `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I], for the E experts that
    live here."""

    def __init__(self, config: ModelConfig, num_experts: int, execution: Execution) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self._weight_gradients = execution.weight_gradients
        self._recompute = execution.recompute

    def forward(self, routed: RoutedRows, *, defers: bool = True) -> Tensor:
        """The weighted sum of each row's experts, [R, D], added up in fp32."""
        later = self._weight_gradients if defers else WeightGradients()
        copies, counts = sort_by_expert(routed, len(self.gate_up_proj))
        rows = spread(routed.rows, copies)
        gate_up = grouped_linear(rows, self.gate_up_proj, counts, later)
        inner = self._recompute.again("swiglu", swiglu, gate_up)
        results = grouped_linear(inner, self.down_proj, counts, later)
        weighted = by_token(results, copies).float() * routed.weights.unsqueeze(-1)
        return weighted.sum(1).to(results.dtype)


def sort_by_expert(routed: RoutedRows, num_experts: int) -> tuple[Copies, Tensor]:
    """Where each choice of [R, K] stands among the choices ordered by expert, those of one expert in the order of rows,
    and how many each expert has, [num_experts] int64."""
    num_rows, num_choices = routed.experts.shape
    experts = routed.experts.flatten()
    if not routed.complete:
        experts = torch.where(experts < 0, num_experts, experts)
    counts = torch.bincount(experts, minlength=num_experts)[:num_experts]
    num_here = experts.numel() if routed.complete else int(counts.sum())
    order = experts.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    slots = places.clamp(max=num_here).view(num_rows, num_choices)
    return Copies(slots, order[:num_here], routed.complete), counts


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for the concatenation [..., 2I]; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
