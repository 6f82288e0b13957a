"""One layer: latent attention, then a dense MLP or experts, each behind a norm and beside a residual.

`forward` is the layer in one process. Whoever spreads experts over processes runs its parts instead, `attend`, `shared`
and `routed`, and carries rows between them: out = residual + shared(normed) + routed(rows of normed).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import AttentionContext, LatentCache, MultiHeadLatentAttention
from model.config import ModelConfig
from model.experts import RoutedExperts, RoutedRows, SwiGLU
from model.linear import Linear
from model.norm import RMSNorm
from model.recompute import Execution
from model.router import Gate, Route


class RouterStats(NamedTuple):
    """What routing leaves behind: the balance loss (scalar, with gradient) and the load [E] in tokens (int64).

    They are values that a layer returns, so recomputing the layer cannot count a token twice.
    """

    balance_loss: Tensor
    load: Tensor


class Attended(NamedTuple):
    """A layer after attention: the residual and the normed input of the second half, [B, S, D] both; and, where it has
    experts, the route of the tokens and its statistics."""

    residual: Tensor
    normed: Tensor
    route: Route | None
    stats: RouterStats | None


class MixtureOfExperts(nn.Module):
    """Gate, the routed experts that live here, and shared experts of one layer."""

    def __init__(self, config: ModelConfig, num_local_experts: int, execution: Execution) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = RoutedExperts(config, num_local_experts, execution)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, execution)
            if config.n_shared_experts
            else None
        )


class Block(nn.Module):
    """One layer of the network; `index` counts from 0 over the main layers, then over those of multi-token
    prediction. Of its routed experts, `num_local_experts` live here."""

    def __init__(self, config: ModelConfig, index: int, *, num_local_experts: int, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self._recompute = execution.recompute
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, execution)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: SwiGLU | MixtureOfExperts
        if index < config.first_k_dense_replace:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, execution)
        else:
            self.mlp = MixtureOfExperts(config, num_local_experts, execution)

    def forward(
        self, x: Tensor, context: AttentionContext, cache: LatentCache | None = None, *, absorbed: bool = False
    ) -> tuple[Tensor, RouterStats | None]:
        """[B, S, D] to [B, S, D], with the statistics of routing where the layer has experts. All experts must be
        here."""
        attended = self.attend(x, context, cache, absorbed=absorbed)
        out, shared = attended.residual, self.shared(attended.normed)
        if attended.route is not None:
            rows = attended.normed.flatten(0, 1)
            routed = self.routed(RoutedRows(rows, attended.route.experts, attended.route.weights))
            out = out + routed.view_as(out)
        return out if shared is None else out + shared, attended.stats

    def attend(
        self, x: Tensor, context: AttentionContext, cache: LatentCache | None = None, *, absorbed: bool = False
    ) -> Attended:
        """Attention, the second norm and the gate."""
        with self._recompute.region():
            return self._attend(x, context, cache, absorbed=absorbed)

    def _attend(self, x: Tensor, context: AttentionContext, cache: LatentCache | None, *, absorbed: bool) -> Attended:
        normed = self._recompute.again("norms", self.input_layernorm, x)
        update = self.self_attn(normed, context, cache, absorbed=absorbed)
        residual, normed = self.post_attention_layernorm(x, update)
        self._recompute.remember("norms", normed, self.post_attention_layernorm, residual)
        if not isinstance(self.mlp, MixtureOfExperts):
            return Attended(residual, normed, None, None)
        route = self.mlp.gate(normed, context.parts)
        return Attended(residual, normed, route, RouterStats(route.balance_loss, route.load))

    def shared(self, normed: Tensor) -> Tensor | None:
        """What every token gets from the second half: the dense MLP or the shared experts, [B, S, D], if there are
        any."""
        mlp = self.mlp if isinstance(self.mlp, SwiGLU) else self.mlp.shared_experts
        if mlp is None:
            return None
        with self._recompute.region():
            out: Tensor = mlp(normed)
        return out

    def routed(self, routed: RoutedRows, *, defers: bool = True) -> Tensor:
        """What rows get from the routed experts that live here, [R, D]; with `defers` their weight gradients wait if
        those of the rank do."""
        assert isinstance(self.mlp, MixtureOfExperts)
        with self._recompute.region():
            out: Tensor = self.mlp.experts(routed, defers=defers)
        return out


class SharedHead(nn.Module):
    """The norm before the head that a prediction depth has for itself; the head is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MultiTokenBlock(Block):
    """One depth of multi-token prediction."""

    def __init__(self, config: ModelConfig, index: int, *, num_local_experts: int, execution: Execution) -> None:
        super().__init__(config, index, num_local_experts=num_local_experts, execution=execution)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, execution, "prediction")
        self.shared_head = SharedHead(config)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The block's input from the embeddings of the next token and the previous depth's states, [B, S, D] all."""
        out: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return out
