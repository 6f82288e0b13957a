"""The norm's kernels at small and odd sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from kernel_cases import check_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 8), (7, 100), (3, 2048), (2, 3000)])
def test_norm(num_rows: int, size: int, dtype: torch.dtype) -> None:
    check_norm(num_rows, size, dtype, torch.float32)


def test_programs_that_see_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.norm.MAX_PROGRAMS", 3)
    check_norm(11, 1025, torch.bfloat16, torch.bfloat16)
    check_norm(29, 500, torch.bfloat16, torch.bfloat16)
