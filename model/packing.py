"""Rows of values in FP8, to be sent or kept: E4M3 codes with a scale for every 128 values of a row (report, section
3.3.3). In half the bytes of bf16.

A row is packed into one run of bytes, so that it travels in one message: of its G = ⌈D / 128⌉ groups

    first all codes, G · 128 bytes, the last group filled up with zeros; then all scales in fp32, G · 4 bytes
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
_PACKED_GROUP = GROUP + torch.float32.itemsize


def encode_rows(rows: Tensor) -> Tensor:
    """Packed rows [R, G * 132] uint8 of rows [R, D]. A group of zeros has scale 1."""
    if rows.is_cuda:
        from model.kernels.fp8_rows import encode_rows as encode_on_gpu

        return encode_on_gpu(rows)
    groups = F.pad(rows.float(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scales = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    codes = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(1)
    return torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=1)


def decode_rows(packed: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse, up to rounding: [R, width]."""
    if packed.is_cuda:
        from model.kernels.fp8_rows import decode_rows as decode_on_gpu

        return decode_on_gpu(packed, width, dtype)
    codes, scales = codes_and_scales(packed)
    values = codes.unflatten(1, (-1, GROUP)).float() * scales.unsqueeze(-1)
    return values.flatten(1)[:, :width].to(dtype)


def restore_rows(kept: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows [R, width] that were kept as they are, or packed."""
    return decode_rows(kept, width, dtype) if kept.dtype == torch.uint8 else kept


def packed_width(width: int) -> int:
    """Bytes of a packed row of so many values."""
    return -(-width // GROUP) * _PACKED_GROUP


def codes_and_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of packed rows, which share their memory: codes [R, G * 128] in E4M3, scales [R, G] in fp32."""
    end_of_codes = packed.shape[1] // _PACKED_GROUP * GROUP
    return packed[:, :end_of_codes].view(torch.float8_e4m3fn), packed[:, end_of_codes:].view(torch.float32)
