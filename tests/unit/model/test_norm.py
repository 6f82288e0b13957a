"""RMSNorm against its formula, in fp32 inside whatever comes in."""

import torch
from torch import Tensor

from model.norm import RMSNorm

torch.set_num_threads(1)


def test_norm_against_its_formula() -> None:
    norm = RMSNorm(5, eps=0.1)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.5, -1.0, 0.0])
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_norm_of_bf16_rounds_only_the_result() -> None:
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    x = (torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 300).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_gradients_are_those_of_the_formula() -> None:
    norm = RMSNorm(6, eps=0.1)
    norm.weight.data = torch.randn(6)
    x, update = torch.randn(2, 3, 4, 6, requires_grad=True).unbind(0)
    grads = torch.randn(3, 4, 6), torch.randn(3, 4, 6)

    def formula(x: Tensor) -> Tensor:
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()

    inputs = (x, update, norm.weight)
    ours = norm(x, update)
    expected = x + update, formula(x + update)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, grads), torch.autograd.grad(expected, inputs, grads))
    alone = torch.autograd.grad(norm(x), (x, norm.weight), grads[0])
    torch.testing.assert_close(alone, torch.autograd.grad(formula(x), (x, norm.weight), grads[0]))


def test_a_part_of_rows_is_normalised_where_it_lies() -> None:
    norm = RMSNorm(4, eps=0.1)
    wide = torch.randn(2, 3, 7)
    assert torch.equal(norm(wide[..., :4]), norm(wide[..., :4].contiguous()))
