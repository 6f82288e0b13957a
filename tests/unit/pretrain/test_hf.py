"""The published layout against transformers' own implementation, and against folders that are not what they claim."""

import json
import random
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, RopeScaling
from model.counts import count_parameters
from model.generate import generate
from model.init import initialize
from model.transformer import Transformer
from pretrain import hf
from pretrain.hf import HFError, export_folder, import_folder
from pretrain.hf_config import hf_config, model_config_from_hf
from pretrain.hf_layout import dequantize, is_quantized, quantize

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
        for bias in model.expert_biases():
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


@pytest.mark.parametrize("seed", range(14))
def test_transformers_agrees_in_both_directions(seed: int, tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    config = random_config(seed)
    ours = random_model(config, seed)
    export(ours, tmp_path / "ours", "fp32", shard_bytes=20_000)
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    mtp = re.compile(r"model\.layers\.(\d+)\.")
    main_layers = [name for name in info["unexpected_keys"] if int(mtp.match(name)[1]) < config.num_hidden_layers]
    assert not main_layers

    tokens = random_tokens(config, 2, NUM_POSITIONS)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert 0.3 < expected.std() < 10
        torch.testing.assert_close(ours.logits(tokens), expected, atol=1e-4, rtol=0)

    greedy = theirs.generate(tokens[:, :7], max_new_tokens=24, do_sample=False)[:, 7:]
    for absorbed in (False, True):
        generated = torch.stack(list(generate(ours, tokens[:, :7], max_new_tokens=24, absorbed=absorbed)), dim=1)
        assert torch.equal(generated, greedy)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_ours(tmp_path / "theirs")
    assert back.config == replace(config, num_nextn_predict_layers=0)
    assert torch.equal(back.logits(tokens), ours.logits(tokens))
    export(back, tmp_path / "again")
    assert_same_bits(read_all(tmp_path / "again"), read_all(tmp_path / "theirs"))


def test_every_option_is_among_the_random_configs() -> None:
    configs = [random_config(seed) for seed in range(14)]
    assert {config.q_lora_rank is None for config in configs} == {True, False}
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.n_group for config in configs} == {1, 2, 4}
    assert {config.topk_group < config.n_group for config in configs} == {True, False}
    assert {config.num_nextn_predict_layers for config in configs} == {0, 1, 2}
    dense = {config.first_k_dense_replace / config.num_hidden_layers for config in configs}
    assert {0, 1} < dense


def test_model_made_by_transformers(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    theirs_config = DeepseekV3Config(
        vocab_size=101, hidden_size=27, intermediate_size=20, moe_intermediate_size=9, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, n_shared_experts=2, n_routed_experts=8, kv_lora_rank=10,
        q_lora_rank=None, qk_rope_head_dim=6, v_head_dim=5, qk_nope_head_dim=7, n_group=2, topk_group=1,
        num_experts_per_tok=3, first_k_dense_replace=1, initializer_range=0.2, experts_implementation="eager",
        rope_parameters={"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "rope_theta": 500},
        max_position_embeddings=64,
    )  # fmt: skip
    theirs = DeepseekV3ForCausalLM(theirs_config)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_folder(tmp_path / "theirs")
    assert "num_nextn_predict_layers = 1" in imported.notes[0]
    assert imported.config.num_nextn_predict_layers == 0
    assert (imported.max_position_embeddings, imported.eos_token_id) == (64, 1)
    ours = load_ours(tmp_path / "theirs")
    tokens = random_tokens(ours.config, 2, NUM_POSITIONS)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert_same_bits(read_all(export(ours, tmp_path / "again")), read_all(tmp_path / "theirs"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_export_of_import_is_the_same_folder(dtype: str, tmp_path: Path) -> None:
    config = replace(random_config(3), num_nextn_predict_layers=2, hidden_size=131, intermediate_size=150)
    first = export(random_model(config), tmp_path / "first", dtype, eos_token_id=5, shard_bytes=200_000)
    imported = import_folder(first)
    second = tmp_path / "second"
    export_folder(
        imported.config,
        imported.tensors,
        second,
        dtype="fp8" if dtype == "fp8" else None,
        max_position_embeddings=imported.max_position_embeddings,
        eos_token_id=imported.eos_token_id,
        shard_bytes=200_000,
    )
    names = sorted(path.name for path in first.iterdir())
    assert len(names) > 4
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    model = random_model(replace(random_config(2), first_k_dense_replace=0)).bfloat16()
    for bias in model.expert_biases():
        bias.data = bias.float()
    stored = read_all(export(model, tmp_path / "out"))
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("bias")} == {torch.float32}
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_bits(load_ours(tmp_path / "out").state_dict(), {k: v.float() for k, v in model.state_dict().items()})


def test_fp8_is_used_where_the_published_files_use_it(tmp_path: Path) -> None:
    config = replace(random_config(2), num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
    stored = read_all(export(random_model(config), tmp_path / "out", "fp8"))
    quantized = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    kinds = {re.sub(r"\d+", "N", name).removeprefix("model.layers.N.") for name in quantized}
    assert kinds == {
        f"{module}.weight"
        for module in (
            "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj",
            "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.N.gate_proj",
            "mlp.experts.N.up_proj", "mlp.experts.N.down_proj", "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
        )
    }  # fmt: skip
    for name, tensor in stored.items():
        if name in quantized:
            assert stored[f"{name}_scale_inv"].dtype == torch.float32
        elif name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == torch.bfloat16
    content = json.loads((tmp_path / "out/config.json").read_text())
    assert content["quantization_config"] == PUBLISHED["quantization_config"]
    assert content["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (576, 300)])
def test_fp8_blocks_against_a_plain_reference(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 1, shape[1])
    weight[: shape[0] // 4] = 0
    codes, scale_inv = quantize(weight, "w")
    assert scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    read = dequantize(codes, scale_inv, (128, 128))
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = (slice(row, row + 128), slice(column, column + 128))
            scale = scale_inv[row // 128, column // 128]
            assert torch.equal(read[block], codes[block].float() * scale)
            largest = weight[block].abs().max()
            torch.testing.assert_close(scale, largest.clamp_min(1e-35) / 448, atol=1e-35, rtol=2**-20)
            # Three bits of mantissa; below 2^-6 the codes are 2^-9 apart.
            bound = torch.maximum(weight[block].abs() * 2**-4, scale * 2**-10)
            assert ((read[block] - weight[block]).abs() <= bound * 1.001).all()
    again = quantize(read, "w")
    assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again[1], scale_inv)


def test_fp8_is_the_same_after_reading_and_writing_again() -> None:
    """Blocks of one value, the largest code: their scale must survive for every mantissa a float can have."""
    mantissas = torch.arange(0, 1 << 23, 1023, dtype=torch.int32)
    weight = (mantissas | 0x3F800000).view(torch.float32).repeat_interleave(128).view(1, -1)
    codes, scale_inv = quantize(weight, "w")
    read = dequantize(codes, scale_inv, (128, 128))
    assert not torch.equal(read, weight)
    again = quantize(read, "w")
    assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again[1], scale_inv)


def test_fp8_blocks_of_another_size(tmp_path: Path) -> None:
    config = random_config(0)
    folder = export(random_model(config), tmp_path / "out", "fp8")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["weight_block_size"] = [4, 8]
    (folder / "config.json").write_text(json.dumps(content))
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        rows, columns = stored[name.removesuffix("_scale_inv")].shape
        stored[name] = torch.rand(-(-rows // 4), -(-columns // 8))
    save_file(stored, folder / "model.safetensors")
    name = "layers.0.self_attn.o_proj.weight"
    codes, scales = stored[f"model.{name}"], stored[f"model.{name}_scale_inv"]
    plain = torch.empty(codes.shape)
    for row in range(plain.shape[0]):
        for column in range(plain.shape[1]):
            plain[row, column] = codes[row, column].float() * scales[row // 4, column // 8]
    assert torch.equal(dict(import_folder(folder).tensors)[name], plain)


def test_fp8_refuses_broken_weights() -> None:
    with pytest.raises(HFError, match=r"tensor w holds infinite or undefined"):
        quantize(torch.tensor([[1.0, float("nan")]]), "w")


def test_shared_tensors_are_copied_to_each_prediction_depth(tmp_path: Path) -> None:
    config = replace(random_config(1), num_hidden_layers=1, num_nextn_predict_layers=2)
    model = random_model(config)
    stored = read_all(export(model, tmp_path / "out"))
    for index in (1, 2):
        assert torch.equal(stored[f"model.layers.{index}.embed_tokens.weight"], model.embed_tokens.weight)
        assert torch.equal(stored[f"model.layers.{index}.shared_head.head.weight"], model.lm_head.weight)
        assert f"model.layers.{index}.eh_proj.weight" in stored
    assert_same_bits(load_ours(tmp_path / "out").state_dict(), model.state_dict())


@torch.no_grad()
def test_transformers_loads_the_prediction_layer(tmp_path: Path) -> None:
    """transformers knows prediction layers of this architecture only as layer 61."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    config = replace(
        random_config(1),
        hidden_size=16,
        num_hidden_layers=61,
        first_k_dense_replace=61,
        num_nextn_predict_layers=1,
    )
    ours = random_model(config)
    export(ours, tmp_path / "out", "fp32")
    main = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    theirs = MtpModel.from_pretrained(main)
    state = torch.randn(2, NUM_POSITIONS, 16, generator=torch.Generator().manual_seed(0))
    embedded = ours.embed_tokens(random_tokens(config, 2, NUM_POSITIONS))
    block = ours.layers["61"]
    expected = block.shared_head.norm(block(block.join(embedded, state), ours._context(NUM_POSITIONS))[0])
    positions = torch.arange(NUM_POSITIONS)[None]
    out = theirs.layers[0](
        embedded,
        state,
        position_embeddings=theirs.rotary_emb(embedded, position_ids=positions),
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
    )
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_tensors_pass_through_one_at_a_time(tmp_path: Path) -> None:
    model = random_model(replace(random_config(0), num_hidden_layers=6))
    alive: list[weakref.ref] = []
    most = 0

    def fresh():
        nonlocal most
        for name, tensor in model.state_dict().items():
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, copy
            del copy

    export_folder(
        model.config, fresh(), tmp_path / "out", dtype=None, max_position_embeddings=64, eos_token_id=1, shard_bytes=1
    )
    assert len(alive) > 50
    assert most <= 3


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(random_config(0))

    def interrupted():
        yield from list(model.state_dict().items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(
            model.config, interrupted(), tmp_path / "out", dtype=None, max_position_embeddings=64, eos_token_id=1
        )
    assert not list(tmp_path.iterdir())


def test_every_file_is_on_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    existed: list[bool] = []
    plain_sync = hf._sync

    def recording_sync(path: Path) -> None:
        synced.append(path)
        existed.append((tmp_path / "out").exists())
        plain_sync(path)

    monkeypatch.setattr(hf, "_sync", recording_sync)
    export(random_model(random_config(0)), tmp_path / "out", shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names < {path.name for path, too_late in zip(synced, existed, strict=True) if not too_late}
    assert synced[-1] == tmp_path


def test_router_bias_is_always_read_in_fp32(tmp_path: Path) -> None:
    config = replace(random_config(0), first_k_dense_replace=0)
    folder = export(random_model(config), tmp_path / "out")
    edit_tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k.endswith("correction_bias")}))(folder)
    biases = [tensor for name, tensor in import_folder(folder).tensors if name.endswith("correction_bias")]
    assert {bias.dtype for bias in biases} == {torch.float32}


def test_export_refuses_a_folder_in_use(tmp_path: Path) -> None:
    model = random_model(random_config(0))
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    with pytest.raises(HFError, match="exists and is not an empty folder"):
        export(model, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(HFError, match="exists and is not an empty folder"):
        export(model, tmp_path / "file")
    with pytest.raises(HFError, match="cannot write"):
        export(model, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"tensor norm.weight is missing"),
        (lambda t: t.update({"norm.wait": torch.ones(27)}), r"tensor norm.wait of shape \[27\]: it is unknown"),
        (lambda t: t.update({"norm.weight": torch.ones(26)}), r"norm.weight of shape \[26\]: it belongs with .*\[27\]"),
        (lambda t: t.update({"norm.weight": torch.ones(27).half()}), r"norm.weight of torch.float16: it must be"),
    ],
)
def test_export_refuses_other_tensors(change, message: str, tmp_path: Path) -> None:
    model = random_model(random_config(0))
    tensors = dict(model.state_dict())
    change(tensors)
    with pytest.raises(HFError, match=message):
        export_folder(
            model.config, tensors.items(), tmp_path / "out", dtype=None, max_position_embeddings=64, eos_token_id=1
        )
    assert not list(tmp_path.iterdir())


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


def with_index(**places: str):
    """Turns the single file into one with an index, and lies in it."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | places
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def duplicate(folder: Path) -> None:
    with_index(**{"model.norm.weight": "0.safetensors"})(folder)
    save_file({"model.norm.weight": torch.ones(27)}, folder / "0.safetensors")


UP_PROJ = "model.layers.0.mlp.experts.1.up_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_tensors(lambda t: t.pop("model.norm.weight")), r"tensor model\.norm\.weight is missing"),
        (edit_tensors(lambda t: t.pop(UP_PROJ)), r"tensor .*experts\.1\.up_proj\.weight is missing"),
        (edit_tensors(lambda t: t.pop("model.layers.1.eh_proj.weight")), r"layers\.1\.eh_proj\.weight is missing"),
        (edit_tensors(lambda t: t.update(extra=torch.ones(1), other=torch.ones(1))), r"tensor extra \(and 1 more\)"),
        (edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(26)})), r"norm.* \[26\].*asks for \[27\]"),
        (edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(27).half()})), r"norm\.weight .*dtype F16"),
        (edit_tensors(lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e4m3fn)})), r"no quantization_config"),
        (
            edit_tensors(lambda t: t.update({"model.layers.1.embed_tokens.weight": torch.zeros(101, 27)})),
            r"layers\.1\.embed_tokens\.weight differs from model\.embed_tokens\.weight",
        ),
        (truncate, r"model\.safetensors is damaged"),
        (only_pickles, r"neither model\.safetensors nor .*pickled weights are never read"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds neither model\.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (edit_json("config.json", lambda c: c.update(max_position_embeddings="far")), r"_embeddings = 'far'"),
        (edit_json("config.json", lambda c: c.update(eos_token_id=[])), r"eos_token_id = \[\]"),
        (edit_json("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})), r"only quant"),
        (with_index(x="../secret.safetensors"), r"names '\.\./secret\.safetensors', which is not .* its own folder"),
        (with_index(x="/etc/passwd"), r"names '/etc/passwd'"),
        (with_index(x="config.json"), r"names 'config\.json', which is not a safetensors file"),
        (with_index(x="b.safetensors"), r"names b\.safetensors, which is missing"),
        (with_index(x="a.safetensors"), r"has tensor x in a\.safetensors, it is in none"),
        (duplicate, r"has tensor model\.norm\.weight in 0\.safetensors, it is in a\.safetensors"),
        (
            lambda folder: (with_index()(folder), (folder / "model.safetensors.index.json").write_text('{"a": 1}')),
            r"weight_map must map",
        ),
    ],
)  # fmt: skip
def test_import_refuses_a_folder_that_is_not_what_it_claims(edit, message: str, tmp_path: Path) -> None:
    config = replace(random_config(0), num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
    folder = export(random_model(config), tmp_path / "out")
    dict(import_folder(folder).tensors)
    edit(folder)
    with pytest.raises(HFError, match=message):
        dict(import_folder(folder).tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}_scale_inv"), r"o_proj\.weight_scale_inv is missing, the scales"),
        (lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(2, 1)}), r"F32 \[2, 1\]; it must be F32 \[1, 1\]"),
        (lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(1, 1).half()}), r"scale_inv is F16"),
        (lambda t: t.update({O_PROJ: t[O_PROJ].bfloat16()}), r"unexpected tensor .*o_proj\.weight_scale_inv"),
        (lambda t: t.update({"model.norm.weight": torch.ones(27).to(torch.float8_e4m3fn)}), r"only for matrices"),
    ],
)  # fmt: skip
def test_import_refuses_wrong_scales(change, message: str, tmp_path: Path) -> None:
    folder = export(random_model(random_config(0)), tmp_path / "out", "fp8")
    edit_tensors(change)(folder)
    with pytest.raises(HFError, match=message):
        import_folder(folder)


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


def test_softmax_gates_cannot_be_exported(tmp_path: Path) -> None:
    model = random_model(replace(random_config(0), scoring_func="softmax"))
    with pytest.raises(HFError, match=r"model\.scoring_func = 'softmax' cannot be exported"):
        export(model, tmp_path / "out")


def test_another_epsilon_is_noted(tmp_path: Path) -> None:
    model = random_model(replace(random_config(0), rms_norm_eps=1e-5))
    notes = export_folder(
        model.config,
        model.state_dict().items(),
        tmp_path / "out",
        dtype=None,
        max_position_embeddings=8,
        eos_token_id=1,
    )
    assert "rms_norm_eps = 1e-05" in notes[0]
    assert import_folder(tmp_path / "out").notes == notes


def test_is_quantized_leaves_the_prediction_projection_alone() -> None:
    assert not is_quantized("model.layers.61.eh_proj.weight")
    assert is_quantized("model.layers.61.self_attn.o_proj.weight")


TEXTS = ["def f(x):\n    return x  # twice\n\n\n\tq", "  leading", "naïve 🙂 世界\r\n", "1234567", "<unk>", ""]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(json.__file__).read_text().splitlines(keepends=False)),
        model_prefix=str(prefix), vocab_size=500, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|eos|>", num_threads=1,
        control_symbols=["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"],
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_transformers_loads_the_sentencepiece_model(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    folder = export(random_model(random_config(0)), tmp_path / "out", tokenizer_file=sentencepiece_file, eos_token_id=1)
    theirs = AutoTokenizer.from_pretrained(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in TEXTS[:4]:
        assert theirs.encode(text) == original.encode(text)
        assert theirs.decode(original.encode(text)) == text
    assert (theirs.eos_token_id, theirs.eos_token, len(theirs)) == (1, "<|eos|>", 500)
    imported = import_folder(folder)
    assert imported.tokenizer_file.read_bytes() == sentencepiece_file.read_bytes()


def test_transformers_loads_a_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|eos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    original.train_from_iterator([Path(json.__file__).read_text()], trainer)
    original.save(str(tmp_path / "any.json"))
    folder = export(
        random_model(random_config(0)), tmp_path / "out", tokenizer_file=tmp_path / "any.json", eos_token_id=0
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.encode(text) == original.encode(text).ids
        assert theirs.decode(original.encode(text).ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|eos|>", 0)
    assert import_folder(folder).tokenizer_file == folder / "tokenizer.json"


def test_export_refuses_a_wrong_tokenizer(sentencepiece_file: Path, tmp_path: Path) -> None:
    model = random_model(random_config(0))
    with pytest.raises(HFError, match=r"has no token 500, the end of document"):
        export(model, tmp_path / "out", tokenizer_file=sentencepiece_file, eos_token_id=500)
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(HFError, match=rf"tokenizer .*{name} cannot be read"):
            export(model, tmp_path / "out", tokenizer_file=tmp_path / name, eos_token_id=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "broken.model"]
