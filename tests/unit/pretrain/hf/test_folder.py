"""The published layout against transformers' own implementation, and import against export."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_support import (
    NUM_POSITIONS,
    assert_same_bits,
    edit_tensors,
    export,
    load_ours,
    random_config,
    random_model,
    random_tokens,
    read_all,
)

from model.generate import generate
from pretrain.hf import folder
from pretrain.hf.folder import export_folder, import_folder

torch.set_num_threads(1)


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
    for bias in model.expert_biases().values():
        bias.data = bias.float()
    stored = read_all(export(model, tmp_path / "out"))
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("bias")} == {torch.float32}
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_bits(load_ours(tmp_path / "out").state_dict(), {k: v.float() for k, v in model.state_dict().items()})


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


def test_every_file_is_on_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    existed: list[bool] = []
    plain_sync = folder._sync

    def recording_sync(path: Path) -> None:
        synced.append(path)
        existed.append((tmp_path / "out").exists())
        plain_sync(path)

    monkeypatch.setattr(folder, "_sync", recording_sync)
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
