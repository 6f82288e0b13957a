"""The kernels of experts in FP8 at small sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from fp8_expert_cases import check_products, check_rounding, values_of

from model.experts import swiglu

COUNTS = [[5, 0, 140], [0, 0, 1]]


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_rounding(counts: list[int], power_of_two: bool) -> None:
    check_rounding(counts, 256, power_of_two=power_of_two)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_products(counts: list[int], is_first: bool) -> None:
    check_products(counts, 256, 128, is_first=is_first)


def test_swiglu_is_rounded_on_the_way() -> None:
    from model.kernels.fp8_quantize import quantize_swiglu, quantize_swiglu_backward

    counts = torch.tensor([3, 0, 30])
    gate_up, grad = torch.randn(33, 256).bfloat16().requires_grad_(), torch.randn(33, 128).bfloat16()
    weights = torch.rand(33, requires_grad=True)
    result = swiglu(gate_up, weights)
    result.backward(grad)
    rounded = values_of(quantize_swiglu(gate_up.detach(), weights.detach(), counts, power_of_two=True))
    torch.testing.assert_close(rounded, result.detach().float(), rtol=1 / 2, atol=0.05)
    inputs = grad, gate_up.detach(), weights.detach(), counts
    by_rows, along_tokens, again, of_weights = quantize_swiglu_backward(*inputs, power_of_two=True)
    assert gate_up.grad is not None
    torch.testing.assert_close(values_of(by_rows), gate_up.grad.float(), rtol=1 / 2, atol=0.05)
    torch.testing.assert_close(of_weights, weights.grad)
    for codes, scale_inv, right in ((*along_tokens, gate_up.grad), (*again, result.detach())):
        values = codes.float() * scale_inv.t().repeat_interleave(128, 1)
        # Three rows in the first tile, thirty in the second.
        places = torch.cat((torch.arange(3), torch.arange(128, 158)))
        torch.testing.assert_close(values[:, places].t(), right.float(), rtol=1 / 2, atol=0.05)
