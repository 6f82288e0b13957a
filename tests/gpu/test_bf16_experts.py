"""Experts in one function of autograd on a GPU, with QuACK's products and with torch's."""

import pytest
import torch
from bf16_expert_cases import CHOICES, LARGE, SIZES, check_fused_experts

from model import quack
from model.bf16_experts import Plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", CHOICES | LARGE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("products", [Plain, quack.Quack])
def test_as_one_operation_at_a_time(
    products: type, sizes: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products is quack.Quack and not quack.is_installed():
        pytest.skip("QuACK is not installed")
    check_fused_experts(products(), name, torch.bfloat16, 1e-2, monkeypatch, sizes=sizes)


@pytest.mark.parametrize("products", [Plain, quack.Quack])
def test_gates_and_ups_kept_in_fp8(products: type, monkeypatch: pytest.MonkeyPatch) -> None:
    if products is quack.Quack and not quack.is_installed():
        pytest.skip("QuACK is not installed")
    check_fused_experts(products(), "random", torch.bfloat16, 1e-2, monkeypatch, packs=True)
