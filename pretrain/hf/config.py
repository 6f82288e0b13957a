"""config.json of the published DeepSeek-V3 layout, from and to our ModelConfig.

A file may state more than our model can do. Whatever would change the function that the weights compute is refused;
what only describes training or serving is ignored.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from pydantic import TypeAdapter, ValidationError

from model.config import ModelConfig, RopeScaling
from pretrain.errors import UserError

Precision = Literal["fp32", "bf16", "fp8"]

ARCHITECTURE = "DeepseekV3ForCausalLM"
FP8_BLOCK = 128

_TORCH_DTYPES: Mapping[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}

# What our model always does; a file that lacks the key means the same.
_FIXED: Mapping[str, object] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "rms_norm_eps",
)
_OPTIONAL = ("num_nextn_predict_layers", "initializer_range", "aux_loss_alpha")
_SCALING = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class HFError(UserError):
    """A Hugging Face folder that cannot be read or written; the message names the file, the key or tensor, the rule."""


def hf_config(
    config: ModelConfig, *, max_position_embeddings: int, eos_token_id: int | None, dtype: Precision
) -> dict[str, Any]:
    """The content of config.json, in the published spelling, which transformers 4 and 5 both read.

    Raises HFError for a model that the published layout cannot express.
    """
    if config.scoring_func != "sigmoid":
        raise HFError(
            f"model.scoring_func = {config.scoring_func!r} cannot be exported: readers of the DeepSeek-V3 layout "
            "always use 'sigmoid'"
        )
    names = [*_REQUIRED, *_OPTIONAL]
    content: dict[str, Any] = {name: getattr(config, name) for name in names} | dict(_FIXED)
    content |= {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v3",
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling_to_hf(config.rope_scaling),
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "seq_aux": True,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": _TORCH_DTYPES[dtype],
    }
    if dtype == "fp8":
        content["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    return dict(sorted(content.items()))


def model_config_from_hf(content: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a config.json, as published or as transformers 4 or 5 writes it.

    Raises HFError for a missing key, a wrong value, and anything that our model does not do.
    """
    if content.get("model_type") != "deepseek_v3":
        _refuse("model_type", content.get("model_type"), "only 'deepseek_v3' can be imported")
    for key, ours in _FIXED.items():
        if (value := content.get(key, ours)) != ours:
            _refuse(key, value, f"this model always has {ours!r}")
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise HFError(f"config.json lacks {', '.join(missing)}; copy the file from the model again")
    heads = content["num_attention_heads"]
    if (value := content.get("num_key_value_heads", heads)) not in (None, heads):
        _refuse("num_key_value_heads", value, f"latent attention has as many as num_attention_heads = {heads}")

    values = {key: content[key] for key in (*_REQUIRED, *_OPTIONAL) if key in content}
    if "num_mtp_layers" in content:
        values.setdefault("num_nextn_predict_layers", content["num_mtp_layers"])
    values |= _rope(content)
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        detail = f"{key} = {first['input']!r}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
        raise HFError(f"config.json: {detail}") from error


def read_int(content: Mapping[str, Any], key: str) -> int:
    """A key that must be a whole number; of a list of them, such as several end-of-text tokens, the first."""
    value = content.get(key)
    first = value[0] if isinstance(value, list) and value else value
    if type(first) is not int or first < 0:
        _refuse(key, value, "it must be a whole number, 0 or more")
    return first


def fp8_block(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks of FP8 weights, None for a model that is not quantised."""
    quantization = content.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        _refuse("quantization_config", quantization, "only quant_method 'fp8' with weight_block_size can be read")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        _refuse(
            "quantization_config.weight_block_size", block, "it must be two sizes, rows and columns, like [128, 128]"
        )
    return block[0], block[1]


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    _check_mscale(scaling.mscale, scaling.mscale_all_dim)
    return {"type": "yarn"} | {name: getattr(scaling, name) for name in _SCALING}


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from the published keys or from transformers 5's `rope_parameters`."""
    table = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        _refuse("rope_scaling", table, "it must be a table")
    theta = table.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        raise HFError("config.json lacks rope_theta; copy the file from the model again")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("default", "yarn"):
        _refuse("rope_scaling.type", kind, "only 'yarn' and unscaled positions are supported")
    known = {"rope_theta", "rope_type", "type"} | (set(_SCALING) if kind == "yarn" else set())
    harmless: dict[str, object] = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
    for key, value in table.items():
        if key not in known and not (key in harmless and value == harmless[key]):
            _refuse(f"rope_scaling.{key}", value, f"it is not supported with type {kind!r}")
    if kind == "default":
        return {"rope_theta": theta}
    scaling = {key: table[key] for key in _SCALING if key in table}
    scaling = {"mscale": 1.0, "mscale_all_dim": 0.0} | scaling
    _check_mscale(scaling["mscale"], scaling["mscale_all_dim"])
    return {"rope_theta": theta, "rope_scaling": scaling}


def _check_mscale(mscale: object, mscale_all_dim: object) -> None:
    """Readers agree on YaRN's temperature only where both are set, or neither (mscale 1, mscale_all_dim 0)."""
    if not (mscale and mscale_all_dim) and (mscale, mscale_all_dim) != (1, 0):
        raise HFError(
            f"rope_scaling.mscale = {mscale!r} with rope_scaling.mscale_all_dim = {mscale_all_dim!r} means different "
            "things to different readers of the layout; set both above 0, as the report does (1 and 1)"
        )


def _refuse(key: str, value: object, rule: str) -> NoReturn:
    raise HFError(f"config.json: {key} = {value!r} cannot be imported: {rule}")
