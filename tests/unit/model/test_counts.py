"""Counts against the report, against real models, and against the operations that torch sees."""

from dataclasses import replace

import pytest
import torch
from support import small_model
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.counts import cache_values_per_token, count_parameters, training_flops_per_token
from model.init import initialize
from model.transformer import Transformer

torch.set_num_threads(1)

DSV3_671B = ModelConfig(
    vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
    topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3, num_nextn_predict_layers=1,
)  # fmt: skip
DSV3_2B = ModelConfig(
    vocab_size=32768, hidden_size=2048, num_hidden_layers=7, num_attention_heads=16, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=8192, moe_intermediate_size=1024,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
)  # fmt: skip
SMALL = {
    "everything": small_model(),
    "no q_lora, two depths": small_model(q_lora_rank=None, num_nextn_predict_layers=2),
    "no experts": small_model(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "no dense layers, no shared experts": small_model(first_k_dense_replace=0, n_shared_experts=0),
}


def test_the_model_of_the_report() -> None:
    counts = count_parameters(DSV3_671B)
    assert counts.total == 671_026_404_352
    assert round(counts.active / 1e9, 1) == 36.6
    one_more_layer = count_parameters(replace(DSV3_671B, num_hidden_layers=62)).total - counts.total
    assert round(one_more_layer / 1e9, 1) == 11.5
    assert counts.mtp == one_more_layer + 2 * 7168**2 + 3 * 7168  # the projection, two norms and that of the head
    assert counts.trained == counts.total + counts.mtp


def test_the_2b_model() -> None:
    counts = count_parameters(DSV3_2B)
    assert (round(counts.total / 1e9, 2), round(counts.active / 1e9, 2)) == (2.77, 0.52)
    assert counts.mtp == 0


@pytest.mark.parametrize("name", SMALL)
def test_real_models_have_as_many(name: str) -> None:
    config = SMALL[name]
    counts = count_parameters(config)
    assert counts.trained == sum(parameter.numel() for parameter in Transformer(config).parameters())


def test_active_parameters_by_hand() -> None:
    config = small_model(first_k_dense_replace=1, num_hidden_layers=2, num_nextn_predict_layers=1)
    attention = 32 * 12 + 12 + 12 * 2 * 12 + 32 * 20 + 16 + 16 * 2 * 16 + 2 * 8 * 32
    norms = 2 * 32
    expert = 3 * 32 * 16
    dense = attention + norms + 3 * 32 * 48
    sparse = attention + norms + 8 * 32 + 2 * expert + expert
    counts = count_parameters(config)
    assert counts.active == dense + sparse + 32 + 96 * 32
    assert counts.total == counts.active + 6 * expert + 96 * 32
    assert counts.mtp_active == sparse + 3 * 32 + 2 * 32 * 32
    assert counts.mtp == counts.mtp_active + 6 * expert


@pytest.mark.parametrize("name", SMALL)
def test_flops_against_those_that_torch_counts(name: str) -> None:
    """torch counts the matrix products of the forward pass, and attention as if it were not causal."""
    config = SMALL[name]
    model = Transformer(config)
    initialize(model, config, seed=0)
    batch_size, seq_len = 2, 12
    tokens = torch.zeros(batch_size, seq_len + 1 + config.num_nextn_predict_layers, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    half_attention = (
        config.num_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len / 2
    )
    forward = training_flops_per_token(config, seq_len) / 3 - 2 * norms + 2 * half_attention
    assert counter.get_total_flops() == pytest.approx(forward * batch_size * seq_len, rel=1e-9)


def test_cache_of_the_report() -> None:
    latent, multi_head = cache_values_per_token(DSV3_671B)
    assert latent == 576
    assert round(100 * (1 - latent / multi_head), 1) == 98.2
