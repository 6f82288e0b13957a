"""A configuration that does not fit together is refused with the key, the value and the rule."""

import pytest
from support import small_model

from model.config import RopeScaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size = 0 must be above 0"),
        ({"vocab_size": -5}, r"vocab_size = -5 must be above 0"),
        ({"q_lora_rank": 0}, r"q_lora_rank = 0 must be above 0"),
        ({"n_shared_experts": -1}, r"n_shared_experts = -1 must be 0 or more"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan must be above 0 and finite"),
        ({"routed_scaling_factor": float("inf")}, r"routed_scaling_factor = inf must be above 0 and finite"),
        ({"rope_theta": 1.0}, r"rope_theta = 1\.0 must be above 1"),
        ({"qk_rope_head_dim": 5}, r"qk_rope_head_dim = 5 must be even"),
        ({"first_k_dense_replace": 4}, r"first_k_dense_replace = 4 must not exceed num_hidden_layers = 3"),
        ({"n_routed_experts": 10}, r"n_routed_experts = 10 must be a multiple of n_group = 4"),
        ({"n_group": 8}, r"n_group = 8 leaves fewer than 2 of 8 experts to a group.*lower n_group"),
        ({"topk_group": 5}, r"topk_group = 5 must not exceed n_group = 4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok = 5 must not exceed the 4 experts of topk_group = 2 groups"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"rope_scaling\.factor = 0\.5 must be at least 1"),
        ({"factor": float("nan")}, r"rope_scaling\.factor = nan must be at least 1"),
        ({"beta_slow": 32.0}, r"rope_scaling\.beta_slow = 32\.0 must be .* below rope_scaling\.beta_fast = 32\.0"),
        ({"beta_slow": 0.0}, r"rope_scaling\.beta_slow = 0\.0 must be above 0"),
        ({"original_max_position_embeddings": 0}, r"original_max_position_embeddings = 0 must be"),
    ],
)
def test_scaling_that_does_not_fit(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**({"factor": 4.0, "original_max_position_embeddings": 4096} | changes))


def test_layers_and_sizes_that_follow() -> None:
    config = small_model(num_nextn_predict_layers=2)
    assert config.qk_head_dim == 12
    assert config.num_layers == 5
    assert config.moe_layers == (1, 2, 3, 4)


def test_zero_is_allowed_where_it_means_none() -> None:
    config = small_model(
        n_shared_experts=0, first_k_dense_replace=0, num_nextn_predict_layers=0, aux_loss_alpha=0.0, q_lora_rank=None
    )
    assert config.moe_layers == (0, 1, 2)
