"""Experts in one function of autograd, with torch's products, in Triton's interpreter."""

import pytest
import torch
from bf16_expert_cases import CHOICES, check_fused_experts

from model.bf16_experts import Plain


def grouped(rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """torch's own, which a CPU has in bf16 alone."""
    parts = rows.tensor_split(offs[:-1].long())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


@pytest.mark.parametrize("name", CHOICES)
def test_as_one_operation_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_grouped_mm", grouped)
    check_fused_experts(Plain, name, torch.float32, 1e-5)


def test_gates_and_ups_kept_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_grouped_mm", grouped)
    check_fused_experts(Plain, "random", torch.float32, 1e-5, packs=True)
