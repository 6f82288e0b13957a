"""Random small models, and folders in the published layout, for the tests of import and export."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, RopeScaling
from model.init import initialize
from model.transformer import Transformer
from pretrain.hf.folder import export_folder, import_folder

torch.set_num_threads(1)

NUM_POSITIONS = 40

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def random_config(seed: int) -> ModelConfig:
    """Small, odd sizes; the options that matter most alternate with the seed, so that few seeds cover all of them."""
    pick = random.Random(seed)
    num_layers = pick.choice([1, 2, 3])
    n_group = (1, 2, 4)[seed % 3]
    topk_group = pick.randint(1, n_group)
    group_size = pick.choice([2, 3, 5])
    scaling = RopeScaling(
        factor=pick.choice([2.0, 4.0, 7.5]),
        original_max_position_embeddings=pick.choice([8, 16]),
        beta_fast=pick.choice([2.0, 32.0]),
        beta_slow=pick.choice([0.25, 1.0]),
        mscale=1.0,
        mscale_all_dim=pick.choice([0.0, 0.5, 1.0]),
    )
    return ModelConfig(
        vocab_size=101,
        hidden_size=27,
        num_hidden_layers=num_layers,
        num_attention_heads=pick.choice([1, 3]),
        q_lora_rank=(None, 11)[seed // 2 % 2],
        kv_lora_rank=pick.choice([10, 13]),
        qk_nope_head_dim=7,
        qk_rope_head_dim=pick.choice([2, 6]),
        v_head_dim=5,
        intermediate_size=19,
        moe_intermediate_size=pick.choice([9, 12]),
        n_routed_experts=n_group * group_size,
        num_experts_per_tok=pick.randint(1, topk_group * group_size),
        n_shared_experts=pick.choice([1, 2]),
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=pick.choice([1.0, 2.5]),
        first_k_dense_replace=pick.randint(0, num_layers),
        num_nextn_predict_layers=pick.choice([0, 1, 2]),
        rope_theta=pick.choice([100.0, 10000.0]),
        rope_scaling=(None, scaling)[seed % 2],
        initializer_range=0.2,
    )


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights with which logits are of order 1 and routing matters; norms and router biases are random too."""
    model = Transformer(config)
    initialize(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        for bias in model.expert_biases().values():
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return model


def export(model: Transformer, out: Path, dtype=None, **options) -> Path:
    options = {"max_position_embeddings": 64, "eos_token_id": None} | options
    export_folder(model.config, model.state_dict().items(), out, dtype=dtype, **options)
    return out


def load_ours(folder: Path) -> Transformer:
    imported = import_folder(folder)
    model = Transformer(imported.config)
    model.load_state_dict(dict(imported.tensors))
    return model


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def random_tokens(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_json(name: str, change):
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit
