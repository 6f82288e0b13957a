"""The kernels of rows that travel in FP8, at small and odd sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from kernel_cases import check_fp8_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 1), (7, 100), (40, 256), (3, 300), (6, 640)])
def test_there_and_back(num_rows: int, width: int, dtype: torch.dtype) -> None:
    check_fp8_rows(num_rows, width, dtype)
