"""SwiGLU's kernels at small and odd sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from kernel_cases import check_swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1), (9, 100), (3, 1024), (2, 2500)])
def test_swiglu(num_rows: int, size: int, weighted: bool, dtype: torch.dtype) -> None:
    check_swiglu(num_rows, size, dtype, weighted=weighted)
