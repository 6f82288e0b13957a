"""Experts in block FP8: the kernels to the bit, and the whole against the same rounding one step at a time."""

import pytest
import torch
from fp8_expert_cases import check_products, check_rounding
from support import small_model

from model import experts as module
from model.experts import RoutedExperts, RoutedRows
from model.fp8 import PARTS_IN_FP8, Fp8, Fp8Config
from model.recompute import Execution

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COUNTS = [[3000, 0, 1, 700, 128, 4000, 129, 234], [0] * 7 + [500]]


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_rounding(counts: list[int], power_of_two: bool) -> None:
    check_rounding(counts, 2048, power_of_two=power_of_two)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_products(counts: list[int], is_first: bool) -> None:
    check_products(counts, 2048, 1024, is_first=is_first)


def test_the_whole_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_model(hidden_size=256, moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=2)
    execution = Execution(fp8=Fp8(Fp8Config(recipe="block", parts=PARTS_IN_FP8)))
    experts = RoutedExperts(config, 8, execution).cuda().bfloat16()
    torch.manual_seed(0)
    for matrix in (experts.gate_up_proj, experts.down_proj):
        torch.nn.init.normal_(matrix, std=0.05)
        matrix.main_grad = torch.zeros_like(matrix, dtype=torch.float32)
    x, grad = torch.randn(2, 300, 256, device="cuda").bfloat16()
    choice = torch.rand(300, 8, device="cuda").topk(2).indices
    weights = torch.rand(300, 2, device="cuda")
    seen = []
    for fused in (True, True, False):
        if not fused:
            monkeypatch.setattr(module, "fused_in", lambda *_, **__: None)
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        for matrix in (experts.gate_up_proj, experts.down_proj):
            matrix.main_grad_is_old, matrix.grad = True, None
        out = experts(RoutedRows(inputs[0], choice, inputs[1]))
        out.backward(grad)
        sums = [
            (matrix.main_grad if matrix.grad is None else matrix.grad).float().clone()
            for matrix in (experts.gate_up_proj, experts.down_proj)
        ]
        seen.append([out.detach(), inputs[0].grad, inputs[1].grad, *sums])
    for first, again, apart in zip(*seen, strict=True):
        assert torch.equal(first, again)
        assert float((first.float() - apart.float()).norm() / apart.float().norm()) < 0.01
