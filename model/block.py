"""One layer: latent attention, then a dense MLP or experts, each behind a norm and beside a residual.

A layer runs in four phases, `attend`, `dispatch`, `experts` and `combine`, so that a scheduler can put the
communication of one micro-batch beside the computation of another. `forward` is the four in order.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import AttentionContext, LatentCache, MultiHeadLatentAttention
from model.config import ModelConfig
from model.experts import Dispatched, Dispatcher, GroupedExperts, LocalDispatcher, SwiGLU
from model.norm import RMSNorm
from model.router import Gate, Route, count_load, sequence_balance_loss


class RouterStats(NamedTuple):
    """What routing leaves behind: the balance loss (scalar, with gradient) and the load [E] in tokens (int64).

    They are values that a layer returns, so recomputing the layer cannot count a token twice.
    """

    balance_loss: Tensor
    load: Tensor


@dataclass(frozen=True)
class BlockState:
    """What passes from phase to phase: the residual, the normed input of the second half and what every token gets
    from it (the dense MLP, or the shared experts), [B, S, D] all, and in a layer with routed experts the route and what
    became of the rows."""

    residual: Tensor
    normed: Tensor
    route: Route | None = None
    dispatched: Dispatched | None = None
    expert_rows: Tensor | None = None
    shared: Tensor | None = None


class MixtureOfExperts(nn.Module):
    """Gate, routed experts and shared experts of one layer. Its dispatcher decides which experts live here."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher, num_local_experts: int) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.gate = Gate(config)
        self.experts = GroupedExperts(config, num_local_experts)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )


class Block(nn.Module):
    """One layer of the network; `index` counts from 0 over the main layers, then over those of multi-token
    prediction."""

    def __init__(self, config: ModelConfig, index: int, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: SwiGLU | MixtureOfExperts
        if index < config.first_k_dense_replace:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            num_experts = config.n_routed_experts
            self.mlp = MixtureOfExperts(config, dispatcher or LocalDispatcher(num_experts), num_experts)

    def forward(
        self, x: Tensor, context: AttentionContext, cache: LatentCache | None = None, *, absorbed: bool = False
    ) -> tuple[Tensor, RouterStats | None]:
        """[B, S, D] to [B, S, D], with the statistics of routing where the layer has experts."""
        state = self.attend(x, context, cache, absorbed=absorbed)
        return self.combine(self.experts(self.dispatch(state))), self.router_stats(state)

    def attend(
        self, x: Tensor, context: AttentionContext, cache: LatentCache | None = None, *, absorbed: bool = False
    ) -> BlockState:
        """Attention, the second norm and the gate."""
        residual = x + self.self_attn(self.input_layernorm(x), context, cache, absorbed=absorbed)
        normed = self.post_attention_layernorm(residual)
        route = self.mlp.gate(normed.flatten(0, 1)) if isinstance(self.mlp, MixtureOfExperts) else None
        return BlockState(residual, normed, route)

    def dispatch(self, state: BlockState) -> BlockState:
        """Sends tokens to their experts; nothing in a dense layer."""
        if not isinstance(self.mlp, MixtureOfExperts):
            return state
        assert state.route is not None
        return replace(state, dispatched=self.mlp.dispatcher.dispatch(state.normed.flatten(0, 1), state.route))

    def experts(self, state: BlockState) -> BlockState:
        """Computes all of the second half: the dense MLP, or the routed experts that live here and the shared ones."""
        if not isinstance(self.mlp, MixtureOfExperts):
            return replace(state, shared=self.mlp(state.normed))
        assert state.dispatched is not None
        rows = self.mlp.experts(state.dispatched.rows, state.dispatched.counts)
        shared = None if self.mlp.shared_experts is None else self.mlp.shared_experts(state.normed)
        return replace(state, expert_rows=rows, shared=shared)

    def combine(self, state: BlockState) -> Tensor:
        """Brings the routed results back and adds everything to the residual: [B, S, D]."""
        out = state.residual
        if isinstance(self.mlp, MixtureOfExperts):
            assert state.route is not None
            assert state.dispatched is not None
            assert state.expert_rows is not None
            routed = self.mlp.dispatcher.combine(state.expert_rows, state.dispatched, state.route)
            out = out + routed.view_as(out)
        return out if state.shared is None else out + state.shared

    def router_stats(self, state: BlockState) -> RouterStats | None:
        """Balance loss and load of the route taken, None in a dense layer."""
        if state.route is None:
            return None
        scores = state.route.scores.view(*state.normed.shape[:2], -1)
        balance_loss = sequence_balance_loss(scores, num_chosen=self.config.num_experts_per_tok)
        with torch.no_grad():
            load = count_load(state.route.experts, self.config.n_routed_experts)
        return RouterStats(balance_loss, load)
