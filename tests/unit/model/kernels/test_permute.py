"""Sums over slots and the counting sort, with ties, empty experts and rows that stand for nothing."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from kernel_cases import check_places, check_sum_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_addends", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "num_slots", "size"), [(20, 9, 3, 40), (5, 2, 16, 2500), (0, 3, 2, 8), (4, 0, 2, 8)]
)
def test_sums(num_rows: int, num_tokens: int, num_slots: int, size: int, num_addends: int, dtype: torch.dtype) -> None:
    check_sum_rows(num_rows, num_tokens, num_slots, size, dtype, num_addends)


@pytest.mark.parametrize("kind", ["even", "skewed", "one expert", "none"])
@pytest.mark.parametrize(("num_choices", "num_experts"), [(0, 4), (1, 1), (700, 8), (256, 3), (300, 1024)])
def test_places(kind: str, num_choices: int, num_experts: int) -> None:
    check_places(kind, num_choices, num_experts)
