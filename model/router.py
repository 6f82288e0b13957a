"""The gate of a mixture-of-experts layer: which experts a token goes to, with what weight, and how load is balanced.

Choice (report, section 2.1.2): affinities s = sigmoid(W x) in fp32; experts are chosen by s + b, where the bias b only
steers the choice; groups are ranked by the sum of their two best biased affinities, and only experts of the best groups
compete. Weights are the unbiased s of the chosen, normalised to 1, times a constant. Ties go to the lower index.

Balance: after each step b moves by γ towards the experts that had less than the mean load (`update_bias`). A small
sequence-wise loss guards against imbalance inside one sequence (`sequence_balance_loss`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import SequenceParts
from model.config import ModelConfig

BIAS_NAME = "e_score_correction_bias"


class Route(NamedTuple):
    """Where tokens go: `experts` [T, K] indices, `weights` [T, K] in fp32, and the affinities `scores` [T, E]."""

    experts: Tensor
    weights: Tensor
    scores: Tensor


class Gate(nn.Module):
    """Scores and chooses. The bias is a buffer in fp32, outside autograd."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(BIAS_NAME, torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Route:
        """Routes x [T, D]."""
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        experts = choose_experts(
            scores.detach() + self.e_score_correction_bias,
            num_experts=self.config.num_experts_per_tok,
            num_groups=self.config.n_group,
            num_chosen_groups=self.config.topk_group,
        )
        weights = scores.gather(-1, experts)
        if self.config.scoring_func == "sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Route(experts, weights * self.config.routed_scaling_factor, scores)


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
    return torch.bincount(experts.flatten(), minlength=num_experts)


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
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
