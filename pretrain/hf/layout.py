"""Tensors of the published DeepSeek-V3 layout: their names, and the FP8 format of their weights.

Our parameters have the published names without the leading `model.`, but some are several published tensors in one:
gate and up projections are stacked, and so are the experts. Every such parameter, flattened to rows, is the published
tensors one below the other, so splitting and joining are the same for all.

FP8 weights are E4M3 with one fp32 scale for each block of 128 × 128 (ragged at the edges): w = code · scale_inv. As in
the published files, the embedding, the head, norms, gates and `eh_proj` stay in bf16 and the router's bias in fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig
from pretrain.hf.config import FP8_BLOCK, HFError, Precision

SCALE_SUFFIX = "_scale_inv"
BIAS_SUFFIX = "e_score_correction_bias"

_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SHARED = {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
_E4M3_MAX = 448.0


def hf_names(config: ModelConfig, name: str) -> list[str]:
    """The published tensors that make up our parameter `name`, in the order of its rows."""
    if name == "lm_head.weight":
        return [name]
    layer, _, stacked = name.rpartition(".mlp.experts.")
    if layer:
        parts = _STACKED[stacked]
        experts = range(config.n_routed_experts)
        return [f"model.{layer}.mlp.experts.{expert}.{part}.weight" for expert in experts for part in parts]
    if name.endswith(".gate_up_proj.weight"):
        module = name.removesuffix(".gate_up_proj.weight")
        return [f"model.{module}.{part}.weight" for part in _STACKED["gate_up_proj"]]
    return [f"model.{name}"]


def hf_copies(config: ModelConfig, name: str) -> list[str]:
    """Where the published layout repeats our parameter `name`: each prediction depth holds embedding and head again."""
    if name not in _SHARED:
        return []
    return [f"model.layers.{index}.{_SHARED[name]}" for index in range(config.num_hidden_layers, config.num_layers)]


def to_hf(config: ModelConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Splits our parameter into published tensors (views of it), then yields its copies."""
    names = hf_names(config, name)
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
    yield from zip(names, rows.chunk(len(names)), strict=True)
    for copy in hf_copies(config, name):
        yield copy, tensor.clone()


def encode(name: str, tensor: Tensor, dtype: Precision | None) -> Iterator[tuple[str, Tensor]]:
    """A published tensor in the dtype of a file, in FP8 followed by its scales. Without dtype it is kept as it is."""
    if dtype is None:
        yield name, tensor
    elif dtype == "fp32" or name.endswith(BIAS_SUFFIX):
        yield name, tensor.float()
    elif dtype == "fp8" and is_quantized(name):
        codes, scale_inv = quantize(tensor, name)
        yield name, codes
        yield name + SCALE_SUFFIX, scale_inv
    else:
        yield name, tensor.bfloat16()


def is_quantized(name: str) -> bool:
    """Whether the published FP8 files hold this tensor in FP8: the matrices of attention, MLPs and experts."""
    return name.endswith(("_proj.weight", ".kv_a_proj_with_mqa.weight")) and not name.endswith(".eh_proj.weight")


def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """weight [R, C] to E4M3 codes [R, C] and scales [⌈R/128⌉, ⌈C/128⌉] in fp32. Raises HFError if it is not finite.

    A scale is the largest magnitude of its block / 448. Quantising a dequantised weight gives the same bytes again.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    if not largest.isfinite().all():
        raise HFError(f"tensor {name} holds infinite or undefined values; export a checkpoint from before they arose")
    scale_inv = (largest / _E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (blocks / scale_inv[:, None, :, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    return codes.view(torch.float8_e4m3fn), scale_inv


def dequantize(codes: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """The inverse in fp32, for blocks of any size (rows, columns)."""
    rows, columns = codes.shape
    scales = scale_inv.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return codes.float() * scales
