"""Experts in one function of autograd on a GPU, with QuACK's products and with torch's."""

from functools import partial

import pytest
import torch
from bf16_expert_cases import CHOICES, LARGE, SIZES, MakeProducts, check_fused_experts, make_experts

from model import quack
from model.bf16_experts import Plain
from model.experts import RoutedRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


PRODUCTS: dict[str, MakeProducts] = {
    "torch": Plain,
    "QuACK": partial(quack.Quack, beside=False),
    "QuACK, other kernels beside": partial(quack.Quack, beside=True),
}


def products_of(name: str) -> MakeProducts:
    if name != "torch" and not quack.is_installed():
        pytest.skip("QuACK is not installed")
    return PRODUCTS[name]


@pytest.mark.parametrize("name", CHOICES | LARGE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("products", PRODUCTS)
def test_as_one_operation_at_a_time(products: str, sizes: tuple[int, int], name: str) -> None:
    check_fused_experts(products_of(products), name, torch.bfloat16, 1e-2, sizes=sizes)


@pytest.mark.parametrize("products", PRODUCTS)
def test_gates_and_ups_kept_in_fp8(products: str) -> None:
    check_fused_experts(products_of(products), "random", torch.bfloat16, 1e-2, packs=True)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_rows_of_which_none_has_an_expert_here(num_rows: int) -> None:
    """What arrives where all tokens chose experts of other ranks."""
    experts = make_experts(256, 128, torch.bfloat16)
    x = torch.randn(num_rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(num_rows, 3, device="cuda", requires_grad=True)
    choices = torch.full((num_rows, 3), -1, device="cuda")
    out = experts(RoutedRows(x, choices, weights, False, 0))
    out.sum().backward()
    for tensor in (out, x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())):
        assert tensor is not None
        assert not tensor.any()
