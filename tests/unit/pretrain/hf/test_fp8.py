"""The FP8 format of the published files against plain loops."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_support import (
    PUBLISHED,
    export,
    random_config,
    random_model,
    read_all,
)
from safetensors.torch import load_file, save_file

from pretrain.hf.folder import HFError, import_folder
from pretrain.hf.layout import dequantize, is_quantized, quantize

torch.set_num_threads(1)


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
    mantissas = torch.arange(0, 1 << 23, 16411, dtype=torch.int32)
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


def test_is_quantized_leaves_the_prediction_projection_alone() -> None:
    assert not is_quantized("model.layers.61.eh_proj.weight")
    assert is_quantized("model.layers.61.self_attn.o_proj.weight")
