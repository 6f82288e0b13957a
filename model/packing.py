"""Rows of values in FP8, to be sent or kept: E4M3 codes with a scale for every 128 values of a row (report, section
3.3.3). In half the bytes of bf16."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes as bytes, [R, G, 128] uint8, and the scale of each group of 128 values, [R, G] in fp32: rows [R, D],
    filled up with zeros. A group of zeros has scale 1."""
    if rows.is_cuda:
        from model.kernels.fp8_rows import encode_rows as encode_on_gpu

        return encode_on_gpu(rows)
    groups = F.pad(rows.float(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scales = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    return (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8), scales


def decode_rows(codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse, up to rounding: [R, width]."""
    if codes.is_cuda:
        from model.kernels.fp8_rows import decode_rows as decode_on_gpu

        return decode_on_gpu(codes, scales, width, dtype)
    values = codes.view(torch.float8_e4m3fn).float() * scales.unsqueeze(-1)
    return values.flatten(1)[:, :width].to(dtype)


def restore_rows(kept: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """Rows [R, width] that were kept as they are, or as codes and scales."""
    return kept[0] if len(kept) == 1 else decode_rows(kept[0], kept[1], width, dtype)
