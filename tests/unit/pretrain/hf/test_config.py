"""config.json: the published one, ours, and those that our model does not do."""

import json

import pytest
import torch
from hf_support import (
    PUBLISHED,
    random_config,
)

from model.config import RopeScaling
from model.counts import count_parameters
from pretrain.hf.config import hf_config, model_config_from_hf
from pretrain.hf.folder import HFError

torch.set_num_threads(1)


def test_published_config_is_the_671b_model() -> None:
    config = model_config_from_hf(PUBLISHED)
    assert count_parameters(config).total == 671_026_404_352
    assert config.rope_scaling == RopeScaling(factor=40, original_max_position_embeddings=4096)
    written = hf_config(config, max_position_embeddings=163840, eos_token_id=1, dtype="fp8")
    ignored = {"auto_map", "transformers_version", "bos_token_id"}
    assert {key: written[key] for key in PUBLISHED.keys() - ignored} == {
        key: value for key, value in PUBLISHED.items() if key not in ignored
    }


@pytest.mark.parametrize("seed", range(6))
def test_config_comes_back(seed: int) -> None:
    config = random_config(seed)
    written = hf_config(config, max_position_embeddings=64, eos_token_id=1, dtype="bf16")
    assert model_config_from_hf(json.loads(json.dumps(written))) == config


def test_config_in_the_spelling_of_transformers_5() -> None:
    content = {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "rope_scaling")}
    content["rope_parameters"] = {**PUBLISHED["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000}
    assert model_config_from_hf(content) == model_config_from_hf(PUBLISHED)
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    config = model_config_from_hf(content)
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


def without(*keys: str):
    return lambda content: [content.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="deepseek_v2"), r"model_type = 'deepseek_v2' .*only 'deepseek_v3'"),
        (without("model_type"), r"model_type = None"),
        (lambda c: c.update(attention_bias=True), r"attention_bias = True cannot be imported: .* always has False"),
        (lambda c: c.update(attention_dropout=0.1), r"attention_dropout = 0.1"),
        (lambda c: c.update(rope_interleave=False), r"rope_interleave = False"),
        (lambda c: c.update(tie_word_embeddings=True), r"tie_word_embeddings = True"),
        (lambda c: c.update(topk_method="greedy"), r"topk_method = 'greedy'"),
        (lambda c: c.update(scoring_func="softmax"), r"scoring_func = 'softmax'"),
        (lambda c: c.update(norm_topk_prob=False), r"norm_topk_prob = False"),
        (lambda c: c.update(hidden_act="gelu"), r"hidden_act = 'gelu'"),
        (lambda c: c.update(moe_layer_freq=2), r"moe_layer_freq = 2"),
        (lambda c: c.update(num_key_value_heads=8), r"num_key_value_heads = 8 .* num_attention_heads = 128"),
        (lambda c: c["rope_scaling"].update(type="linear"), r"rope_scaling\.type = 'linear'"),
        (lambda c: c["rope_scaling"].update(attention_factor=2.0), r"rope_scaling\.attention_factor = 2\.0"),
        (lambda c: c["rope_scaling"].update(truncate=False), r"rope_scaling\.truncate = False"),
        (lambda c: c["rope_scaling"].update(mscale=0.7, mscale_all_dim=0), r"mscale = 0\.7 .* set both above 0"),
        (lambda c: c["rope_scaling"].pop("factor"), r"rope_scaling\.factor"),
        (lambda c: c["rope_scaling"].update(factor=0.5), r"rope_scaling\.factor = 0\.5"),
        (lambda c: c.update(rope_scaling=[1]), r"rope_scaling = \[1\]"),
        (without("rope_theta"), r"lacks rope_theta"),
        (without("kv_lora_rank", "n_group"), r"lacks kv_lora_rank, n_group"),
        (lambda c: c.update(hidden_size="large"), r"hidden_size = 'large'"),
        (lambda c: c.update(hidden_size=True), r"hidden_size = True"),
        (lambda c: c.update(hidden_size=7168.0), r"hidden_size = 7168\.0"),
        (lambda c: c.update(n_group=7), r"n_routed_experts = 256 must be a multiple of n_group = 7"),
        (lambda c: c.update(rms_norm_eps=float("nan")), r"rms_norm_eps"),
    ],
)  # fmt: skip
def test_config_refuses_what_the_model_does_not_do(change, message: str) -> None:
    content = json.loads(json.dumps(PUBLISHED))
    change(content)
    with pytest.raises(HFError, match=message):
        model_config_from_hf(content)
