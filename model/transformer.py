"""The whole network: embedding, layers, multi-token prediction and head.

Parameters carry the published names (`layers.3.self_attn.kv_b_proj.weight`, without the leading `model.`), counted over
the whole model, so a part of it has the same names as the whole.

Multi-token prediction (report, section 2.2) adds after the main layers, at depth k, one block fed with
M · [RMSNorm(Emb(x_{t+k})) ; RMSNorm(h_t)], which predicts x_{t+k+1} through the embedding and head that it shares. The
report writes the two halves the other way round; this is the order of the published weights. h_t is the state that the
head of the depth before it sees, after its norm, as in the programs that serve those weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import AttentionContext, LatentCache, causal_mask, document_mask
from model.block import Block, RouterStats
from model.config import ModelConfig
from model.loss import cross_entropy
from model.norm import RMSNorm
from model.rope import rotary_frequencies, rotary_table

LOSS_CHUNK = 8192


class Losses(NamedTuple):
    """Means over the tokens of a batch in nats (`mtp_loss` also over depths), `balance_loss` summed over layers without
    α, all scalars with gradient; and `load` [MoE layers, E], tokens per expert in int64."""

    lm_loss: Tensor
    mtp_loss: Tensor
    balance_loss: Tensor
    load: Tensor


class SharedHead(nn.Module):
    """The norm before the head that a prediction depth has for itself; the head is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MultiTokenBlock(Block):
    """One depth of multi-token prediction."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The block's input from the embeddings of the next token and the previous depth's states, [B, S, D] all."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict()
        for index in range(config.num_layers):
            make = Block if index < config.num_hidden_layers else MultiTokenBlock
            self.layers[str(index)] = make(config, index)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies = rotary_frequencies(config.qk_rope_head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Losses:
        """Training losses of tokens [B, S + 1 + depth]: the last 1 + depth columns are only ever predicted.

        With `documents` (ids of the same shape) no token attends to another document.
        """
        num_positions = tokens.shape[1] - 1 - self.config.num_nextn_predict_layers
        context = self._context(num_positions)
        if documents is not None:
            context = AttentionContext(context.rotary, document_mask(documents[:, :num_positions]))
        hidden, stats = self._run_main_layers(self.embed_tokens(tokens[:, :num_positions]), context)
        hidden = self.norm(hidden)
        lm_loss = self._loss(hidden, tokens[:, 1 : num_positions + 1])

        mtp_losses = []
        for depth in range(1, self.config.num_nextn_predict_layers + 1):
            block = self.layers[str(self.config.num_hidden_layers + depth - 1)]
            assert isinstance(block, MultiTokenBlock)
            joined = block.join(self.embed_tokens(tokens[:, depth : num_positions + depth]), hidden)
            hidden, block_stats = block(joined, context)
            stats += [block_stats] if block_stats else []
            hidden = block.shared_head.norm(hidden)
            mtp_losses.append(self._loss(hidden, tokens[:, depth + 1 : num_positions + depth + 1]))
        zero = lm_loss.new_zeros(())
        return Losses(
            lm_loss,
            torch.stack(mtp_losses).mean() if mtp_losses else zero,
            torch.stack([layer.balance_loss for layer in stats]).sum() if stats else zero,
            torch.stack([layer.load for layer in stats])
            if stats
            else torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64, device=tokens.device),
        )

    def logits(self, tokens: Tensor, caches: list[LatentCache] | None = None, *, absorbed: bool = False) -> Tensor:
        """Next-token logits in fp32: tokens [B, S] to [B, S, vocab_size].

        With caches (one a main layer) the tokens follow those already there. `absorbed` attends in the latent space.
        """
        past = caches[0].length if caches else 0
        context = self._context(tokens.shape[1], past=past)
        hidden, _ = self._run_main_layers(self.embed_tokens(tokens), context, caches, absorbed=absorbed)
        return self.lm_head(self.norm(hidden)).float()

    def make_caches(self, batch_size: int, capacity: int) -> list[LatentCache]:
        """Empty caches for `capacity` positions of `batch_size` sequences."""
        like = self.embed_tokens.weight
        return [LatentCache(batch_size, capacity, self.config, like=like) for _ in range(self.config.num_hidden_layers)]

    def expert_biases(self) -> list[Tensor]:
        """The routers' bias buffers, each [E] in fp32, in the order of `Losses.load`."""
        return [self.get_buffer(f"layers.{index}.mlp.gate.e_score_correction_bias") for index in self.config.moe_layers]

    def _context(self, num_positions: int, *, past: int = 0) -> AttentionContext:
        device = self.frequencies.device
        positions = torch.arange(past, past + num_positions, device=device)
        rotary = rotary_table(self.frequencies, positions, scaling=self.config.rope_scaling)
        mask = causal_mask(num_positions, past + num_positions, device=device) if past else None
        return AttentionContext(rotary, mask)

    def _run_main_layers(
        self,
        x: Tensor,
        context: AttentionContext,
        caches: list[LatentCache] | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Tensor, list[RouterStats]]:
        stats: list[RouterStats] = []
        for index in range(self.config.num_hidden_layers):
            x, layer_stats = self.layers[str(index)](x, context, caches[index] if caches else None, absorbed=absorbed)
            stats += [layer_stats] if layer_stats else []
        return x, stats

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(hidden, self.lm_head.weight, labels, chunk_size=LOSS_CHUNK)
