"""RMSNorm against its formula, in fp32 inside whatever comes in."""

import torch

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
