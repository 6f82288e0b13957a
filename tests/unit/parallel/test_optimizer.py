"""Sums of gradients from step to step, clipping, and AdamW's kernel at small and odd sizes."""

import math
import os
from typing import Any

import pytest
import torch
from optimizer_cases import check_kernel
from torch import Tensor, nn

from model.linear import add_gradient
from parallel.optimizer import clipping, forget_gradient, gradient_sum, sum_in_fp32

BF16 = torch.bfloat16

if not torch.cuda.is_available():
    # Kernels run under Triton's interpreter, which must be said before they are read.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("numel", [1, 16, 1000, 1024, 2500])
def test_kernel_is_torch_s_adamw(numel: int, moments: Any) -> None:
    pytest.importorskip("triton", reason="the kernel needs triton")
    # The interpreter cuts bf16 off.
    on_gpu = torch.cuda.is_available()
    check_kernel(numel, moments, "cuda" if on_gpu else "cpu", rounds_to_nearest=on_gpu)


def parameter_with_sum() -> tuple[nn.Parameter, Tensor]:
    """A bf16 weight, and its sum, which holds something already."""
    parameter, total = nn.Parameter(torch.ones(3, dtype=BF16)), torch.full((3,), 7.0)
    sum_in_fp32(parameter, total)
    return parameter, total


@pytest.mark.parametrize("first", ["autograd", "past it"])
def test_the_first_gradient_of_a_step_replaces_the_old_sum(first: str) -> None:
    parameter, total = parameter_with_sum()
    for step in range(2):
        gradient = torch.tensor([1.0, 2.0, 3.0], dtype=BF16) + step
        for turn in range(3):
            if (first == "autograd") == (turn % 2 == 0):
                parameter.backward(gradient)
            else:
                add_gradient(parameter, gradient)
            assert torch.equal(total, (turn + 1) * gradient.float())
            assert parameter.grad is None
        assert gradient_sum(parameter) is total
        forget_gradient(parameter)


def test_no_gradient_counts_as_zero() -> None:
    parameter, total = parameter_with_sum()
    assert torch.equal(gradient_sum(parameter), torch.zeros(3))
    add_gradient(parameter, torch.ones(3, dtype=BF16))
    assert torch.equal(total, torch.ones(3))
    forget_gradient(parameter)
    assert torch.equal(gradient_sum(parameter), torch.zeros(3))
    # Also where the gradient is fp32, in `grad`.
    plain = nn.Parameter(torch.ones(2))
    assert torch.equal(gradient_sum(plain), torch.zeros(2))
    plain.backward(torch.ones(2))
    forget_gradient(plain)
    assert torch.equal(gradient_sum(plain), torch.zeros(2))


def test_what_is_not_finite_is_forgotten_too() -> None:
    parameter, total = parameter_with_sum()
    add_gradient(parameter, torch.full((3,), torch.nan, dtype=BF16))
    forget_gradient(parameter)
    add_gradient(parameter, torch.ones(3, dtype=BF16))
    assert torch.equal(total, torch.ones(3))


def test_clipping() -> None:
    assert clipping(0.5, 1.0) == 1.0
    assert clipping(4.0, 1.0) == pytest.approx(0.25)
    assert clipping(math.pi, 0.0) == 1.0
