"""Parameters and floating-point operations of a model, without allocating it."""

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.transformer import Transformer


@dataclass(frozen=True)
class ParameterCounts:
    """`total` and `active` are those of the main model, as the report counts them: multi-token prediction is left out,
    and so is, from `active`, the embedding (a table that is looked up, not multiplied). `mtp` is what prediction of
    further tokens adds, `mtp_active` what of it a token uses. `trained` is everything the optimizer sees."""

    total: int
    active: int
    mtp: int
    mtp_active: int

    @property
    def trained(self) -> int:
        """Parameters in the optimizer."""
        return self.total + self.mtp


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of the model built on the meta device."""
    with torch.device("meta"):
        model = Transformer(config)
    counts = {"total": 0, "active": 0, "mtp": 0, "mtp_active": 0}
    for name, parameter in model.named_parameters():
        is_mtp = name.startswith("layers.") and int(name.split(".")[1]) >= config.num_hidden_layers
        counts["mtp" if is_mtp else "total"] += parameter.numel()
        if ".mlp.experts." in name:
            active = parameter.numel() // config.n_routed_experts * config.num_experts_per_tok
        else:
            active = 0 if name.startswith("embed_tokens") else parameter.numel()
        counts["mtp_active" if is_mtp else "active"] += active
    return ParameterCounts(**counts)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """6 FLOPs for each active parameter (the head again for each prediction depth) and causal attention over half of
    `seq_len`; forward and backward, without recomputation."""
    counts = count_parameters(config)
    head = config.vocab_size * config.hidden_size * config.num_nextn_predict_layers
    attention = config.num_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len / 2
    return 6.0 * (counts.active + counts.mtp_active + head + attention)


def cache_values_per_token(config: ModelConfig) -> tuple[int, int]:
    """Values a token leaves in each layer's cache: (latent attention, multi-head attention with as many heads and
    plain, not decoupled, rotary keys: 2 · heads · head size)."""
    mha = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return config.kv_lora_rank + config.qk_rope_head_dim, mha
