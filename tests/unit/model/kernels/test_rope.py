"""Rotary positions in place and keys from parts, with heads beside each other or far apart."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from kernel_cases import check_keys, check_rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "rotary_dim"), [((2, 5, 3, 22), 6), ((1, 70, 1, 64), 64), ((2, 3, 40, 80), 64), ((0, 3, 2, 8), 8)]
)
def test_rotation(shape: tuple[int, int, int, int], rotary_dim: int, heads_first: bool, dtype: torch.dtype) -> None:
    check_rotation(shape, rotary_dim, dtype, heads_first=heads_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "dims"),
    [(2, 3, 3, (10, 6, 12)), (1, 2, 40, (128, 64, 128)), (1, 4, 1, (8, 2, 3)), (0, 4, 2, (8, 4, 8))],
)
def test_keys(
    batch: int, length: int, num_heads: int, dims: tuple[int, int, int], heads_first: bool, dtype: torch.dtype
) -> None:
    check_keys(batch, length, num_heads, dims, dtype, heads_first=heads_first)
