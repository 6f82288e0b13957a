"""The gate of a mixture-of-experts layer: which experts a token goes to, with what weight, and how load is balanced.

Choice (report, section 2.1.2): affinities s = sigmoid(W x) in fp32; experts are chosen by s + b, where the bias b only
steers the choice; groups are ranked by the sum of their two best biased affinities, and only experts of the best groups
compete. Weights are the unbiased s of the chosen, normalised to 1, times a constant. Ties go to the lower index.

Balance: after each step b moves by γ towards the experts that had less than the mean load (`update_bias`). A small
sequence-wise loss guards against imbalance inside one sequence (`sequence_balance_loss`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.attention import SequenceParts
from model.config import ModelConfig
from model.products import product_in_fp32

BIAS_NAME = "e_score_correction_bias"


class Route(NamedTuple):
    """Where tokens go: `experts` [T, K] indices and `weights` [T, K] in fp32; how many tokens each expert gets, `load`
    [E] in int64; and the balance loss of their sequences, a scalar with gradient."""

    experts: Tensor
    weights: Tensor
    load: Tensor
    balance_loss: Tensor


class Gate(nn.Module):
    """Scores and chooses. The bias is a buffer in fp32, outside autograd."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(BIAS_NAME, torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor, parts: SequenceParts | None = None) -> Route:
        """Routes x [B, S, D], positions of B sequences: all of them, or those that are here of sequences in `parts`."""
        rows, num_sequences = x.flatten(0, 1), len(x)
        if x.is_cuda:
            return Route(
                *_KernelGate.apply(rows, self.weight, self.e_score_correction_bias, self.config, num_sequences, parts)
            )
        logits: Tensor = _Logits.apply(rows, self.weight)
        return route(logits, self.e_score_correction_bias, self.config, num_sequences, parts)


def route(
    logits: Tensor, bias: Tensor, config: ModelConfig, num_sequences: int, parts: SequenceParts | None = None
) -> Route:
    """The route of logits [T, E] in plain torch, with gradients by autograd."""
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    experts = choose_experts(
        scores.detach() + bias,
        num_experts=config.num_experts_per_tok,
        num_groups=config.n_group,
        num_chosen_groups=config.topk_group,
    )
    weights = scores.gather(-1, experts)
    if config.scoring_func == "sigmoid":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Route(
        experts,
        weights * config.routed_scaling_factor,
        count_load(experts, config.n_routed_experts),
        sequence_balance_loss(
            scores.unflatten(0, (num_sequences, -1)), num_chosen=config.num_experts_per_tok, parts=parts
        ),
    )


def choose_experts(biased: Tensor, *, num_experts: int, num_groups: int, num_chosen_groups: int) -> Tensor:
    """The best experts [T, num_experts] of the best groups by biased affinities [T, E], best first."""
    if num_chosen_groups < num_groups:
        grouped = biased.unflatten(-1, (num_groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(-1, _best(group_scores, num_chosen_groups), True)
        biased = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    return _best(biased, num_experts)


def count_load(experts: Tensor, num_experts: int) -> Tensor:
    """How many tokens each expert received: [T, K] to [num_experts] in int64."""
    choices = experts.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=experts.device).scatter_add_(
        0, choices, torch.ones_like(choices)
    )


def sequence_balance_loss(scores: Tensor, *, num_chosen: int, parts: SequenceParts | None = None) -> Tensor:
    """Mean over sequences of Σ f_i P_i (report, equations 17 to 20, without α); scores [B, S, E] to a scalar.

    f_i is E/(K·S) times how often expert i is among the K best affinities, P_i the mean of its normalised affinity. Of
    sequences in `parts`, f_i counts all positions and P_i those that are here; the mean over parts is the whole loss.
    """
    num_positions, num_experts = scores.shape[1:]
    best = _best(scores.detach(), num_chosen)
    chosen = torch.zeros_like(scores, requires_grad=False).scatter_(-1, best, 1.0)
    counts = chosen.sum(1)
    if parts is not None:
        counts, num_positions = parts.sum(counts), num_positions * parts.size
    frequency = counts * (num_experts / (num_chosen * num_positions))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (frequency * probability).sum(-1).mean()


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, speed: float) -> None:
    """Moves bias [..., E] in place: up by `speed` below the mean load, down by it above, counted over a whole step."""
    load = load.to(torch.float64)
    bias += speed * torch.sign(load.mean(-1, keepdim=True) - load).to(bias.dtype)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of the last dimension, best first, the lower index where equal."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


class _Logits(torch.autograd.Function):
    """x Wᵀ in fp32, keeping x as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return product_in_fp32(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return _gradients(grad, x, ctx.weight)


class _KernelGate(torch.autograd.Function):
    """Gate and balance loss by kernels, with what autograd does for `route`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor,
        config: ModelConfig,
        num_sequences: int,
        parts: SequenceParts | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from model.kernels import gate as kernels

        logits = product_in_fp32(x, weight.t())
        routing = kernels.route(
            logits,
            bias,
            num_sequences=num_sequences,
            num_experts=config.num_experts_per_tok,
            num_groups=config.n_group,
            num_chosen_groups=config.topk_group,
            is_sigmoid=config.scoring_func == "sigmoid",
            factor=config.routed_scaling_factor,
        )
        counts, size = (routing.counts, 1) if parts is None else (parts.sum(routing.counts), parts.size)
        num_positions = len(x) // num_sequences
        # f_i is E/(K·S) times counts, with S of whole sequences; P_i is sums over the positions that are here.
        frequency = config.n_routed_experts / (config.num_experts_per_tok * num_positions * size)
        balance_factor = frequency / (num_positions * num_sequences)
        ctx.save_for_backward(x, logits, routing.experts, counts)
        ctx.weight, ctx.config, ctx.balance_factor = weight, config, balance_factor
        ctx.mark_non_differentiable(routing.experts, routing.load)
        ctx.set_materialize_grads(False)
        balance_loss = (counts * routing.sums).sum() * balance_factor
        return routing.experts, routing.weights, routing.load, balance_loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _experts: None, grad_weights: Tensor | None, _load: None, grad_balance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from model.kernels import gate as kernels

        x, logits, experts, counts = ctx.saved_tensors
        grad = kernels.route_backward(
            logits.new_zeros(experts.shape) if grad_weights is None else grad_weights,
            logits.new_zeros(()) if grad_balance is None else grad_balance,
            logits,
            experts,
            counts,
            is_sigmoid=ctx.config.scoring_func == "sigmoid",
            factor=ctx.config.routed_scaling_factor,
            balance_factor=ctx.balance_factor,
            in_terms=x.dtype == ctx.weight.dtype == torch.bfloat16,
        )
        return *_gradients(grad, x, ctx.weight), None, None, None, None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and the weight from that of the logits: [T, E] in fp32, or [T, 3, E] as a sum of three in bf16."""
    if grad.dtype == torch.float32:
        return (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)
    terms = grad.flatten(1)
    grad_weight = product_in_fp32(terms.t(), x).unflatten(0, (3, -1)).sum(0)
    return terms @ weight.repeat(3, 1), grad_weight.to(weight.dtype)
