"""The whole network: embedding, layers, multi-token prediction and head.

Parameters carry the published names (`layers.3.self_attn.kv_b_proj.weight`, without the leading `model.`), counted over
the whole model, so a part of it has the same names as the whole.

Multi-token prediction (report, section 2.2) adds after the main layers, at depth k, one block fed with
M · [RMSNorm(Emb(x_{t+k})) ; RMSNorm(h_t)], which predicts x_{t+k+1} through the embedding and head that it shares. The
report writes the two halves the other way round; this is the order of the published weights. h_t is the state that the
head of the depth before it sees, after its norm, as in the programs that serve those weights.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import AttentionContext, LatentCache, SequenceParts, causal_mask, document_mask
from model.block import Block, MultiTokenBlock, RouterStats
from model.config import ModelConfig
from model.experts import RoutedExperts
from model.fp8 import Fp8, Fp8Config
from model.linear import Linear
from model.loss import cross_entropy
from model.norm import RMSNorm
from model.recompute import Execution, Recompute
from model.rope import rotary_frequencies, rotary_table
from model.router import BIAS_NAME

LOSS_CHUNK = 8192


class Losses(NamedTuple):
    """Means over the tokens of a batch in nats (`mtp_loss` also over depths), `balance_loss` summed over layers without
    α, all scalars with gradient; and `load` [MoE layers, E], tokens per expert in int64."""

    lm_loss: Tensor
    mtp_loss: Tensor
    balance_loss: Tensor
    load: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A part of the network: some of its layers (those of multi-token prediction included), with or without embedding
    and head; and of every layer's routed experts `num_local_experts` from `first_expert` on."""

    layers: tuple[int, ...]
    embedding: bool
    head: bool
    first_expert: int
    num_local_experts: int


def whole_model(config: ModelConfig) -> ModelPart:
    """Everything."""
    return ModelPart(
        layers=tuple(range(config.num_layers)),
        embedding=True,
        head=True,
        first_expert=0,
        num_local_experts=config.n_routed_experts,
    )


def products_in_fp8(config: ModelConfig, fp8: Fp8Config) -> tuple[list[str], list[str]]:
    """The products of a layer that are in FP8 and those that are not, of the parts that may be; by name in the layers
    that have them, such as `self_attn.o_proj`."""
    moe = tuple(index for index in config.moe_layers if index < config.num_hidden_layers)
    part = replace(whole_model(config), layers=(0, *moe[:1]), embedding=False, head=False, num_local_experts=1)
    with torch.device("meta"):
        model = Transformer(config, part, fp8=fp8)
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        short = name.partition(".")[2].partition(".")[2]
        if isinstance(module, Linear):
            found[short] = module.quantizer is not None
        elif isinstance(module, RoutedExperts):
            found[f"{short}.gate_up_proj"] = module.gate_up_quantizer is not None
            found[f"{short}.down_proj"] = module.down_quantizer is not None
    return [name for name, is_low in found.items() if is_low], [name for name, is_low in found.items() if not is_low]


class Head(nn.Module):
    """The projection to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits in fp32 of [..., D], or with labels [...] their mean cross-entropy, a scalar."""
        if labels is None:
            return F.linear(hidden, self.weight).float()
        return cross_entropy(hidden, self.weight, labels, chunk_size=LOSS_CHUNK)


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model, or the `part` of it that lives here. Only the whole can run by itself."""

    frequencies: Tensor

    def __init__(
        self,
        config: ModelConfig,
        part: ModelPart | None = None,
        *,
        recompute: frozenset[str] = frozenset(),
        packs_swiglu: bool = False,
        fp8: Fp8Config | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.part = part = part or whole_model(config)
        self.execution = Execution(recompute=Recompute(recompute), fp8=Fp8(fp8), packs_swiglu=packs_swiglu)
        if part.embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict()
        for index in part.layers:
            make = Block if index < config.num_hidden_layers else MultiTokenBlock
            self.layers[str(index)] = make(
                config, index, num_local_experts=part.num_local_experts, execution=self.execution
            )
        if part.head:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.lm_head = Head(config)
        frequencies = rotary_frequencies(config.qk_rope_head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Losses:
        """Training losses of tokens [B, S + 1 + depth]: the last 1 + depth columns are only ever predicted.

        With `documents` (ids of the same shape) no token attends to another document.
        """
        num_positions = tokens.shape[1] - 1 - self.config.num_nextn_predict_layers
        context = self.training_context(num_positions, documents)
        hidden, stats = self._run_main_layers(self.embed_tokens(tokens[:, :num_positions]), context)
        hidden = self.norm(hidden)
        lm_loss = self.lm_head(hidden, tokens[:, 1 : num_positions + 1])

        mtp_losses = []
        for depth in range(1, self.config.num_nextn_predict_layers + 1):
            block = self.multi_token_block(depth)
            joined = block.join(self.embed_tokens(tokens[:, depth : num_positions + depth]), hidden)
            hidden, block_stats = block(joined, context)
            stats += [block_stats] if block_stats else []
            hidden = block.shared_head.norm(hidden)
            mtp_losses.append(self.lm_head(hidden, tokens[:, depth + 1 : num_positions + depth + 1]))
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
        out: Tensor = self.lm_head(self.norm(hidden))
        return out

    def make_caches(self, batch_size: int, capacity: int) -> list[LatentCache]:
        """Empty caches for `capacity` positions of `batch_size` sequences."""
        like = self.embed_tokens.weight
        return [LatentCache(batch_size, capacity, self.config, like=like) for _ in range(self.config.num_hidden_layers)]

    def expert_biases(self) -> dict[int, Tensor]:
        """The bias buffers of the routers that are here, each [E] in fp32, by layer."""
        layers = [index for index in self.part.layers if index in self.config.moe_layers]
        return {index: self.get_buffer(f"layers.{index}.mlp.gate.{BIAS_NAME}") for index in layers}

    def block(self, index: int) -> Block:
        """A layer by its index in the whole network."""
        block = self.layers[str(index)]
        assert isinstance(block, Block)
        return block

    def multi_token_block(self, depth: int) -> MultiTokenBlock:
        """The block of a prediction depth, from 1."""
        block = self.layers[str(self.config.num_hidden_layers + depth - 1)]
        assert isinstance(block, MultiTokenBlock)
        return block

    def training_context(
        self, num_positions: int, documents: Tensor | None, parts: SequenceParts | None = None
    ) -> AttentionContext:
        """For sequences of `num_positions`, attending inside `documents` [B, >= num_positions] where they are given; of
        sequences in `parts`, the context of the positions that are here."""
        mask = None if documents is None else document_mask(documents[:, :num_positions])
        if parts is None:
            return AttentionContext(self._context(num_positions).rotary, mask)
        num_here = num_positions // parts.size
        positions = torch.arange(parts.place * num_here, (parts.place + 1) * num_here, device=self.frequencies.device)
        rotary = rotary_table(self.frequencies, positions, scaling=self.config.rope_scaling)
        return AttentionContext(rotary, mask, parts)

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
