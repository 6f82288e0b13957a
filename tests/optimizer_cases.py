"""Checks of AdamW that CPUs run with few elements, under Triton's interpreter, and GPUs with many."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parallel.optimizer import AdamW, OptimizerConfig

BF16, FP32 = torch.bfloat16, torch.float32
STEPS, RATE, SCALE = 3, 1e-2, 0.25
CONFIG: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def start(numel: int, moments: Any, device: str) -> tuple[AdamW, Tensor]:
    """An optimizer and the flat tensor [numel] that it updates."""
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(numel, device=device, generator=generator).requires_grad_()
    adam = AdamW([{"params": [weights], "weight_decay": 0.1}], OptimizerConfig(moments=moments, **CONFIG))
    adam.start()
    for group in adam.param_groups:
        group["lr"] = RATE
    return adam, weights


def sizes(numel: int, device: str) -> Tensor:
    """How large the gradients of each element are: from 1e-7 to 1e7."""
    return torch.exp(4 * torch.randn(numel, device=device, generator=torch.Generator(device).manual_seed(2)))


def gradients(numel: int, device: str) -> Iterator[Tensor]:
    """Of each step, zero here and there."""
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(STEPS):
        wide = sizes(numel, device) * torch.randn(numel, device=device, generator=generator)
        yield wide.masked_fill_(torch.rand(numel, device=device, generator=generator) < 0.1, 0.0)


def update_plainly(numel: int, moments: Any, device: str) -> list[Tensor]:
    """Weights and moments after all steps of torch's AdamW; bf16 moments are fp32 ones rounded after each."""
    _, weights = start(numel, moments, device)
    plain = torch.optim.AdamW([weights], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients(numel, device):
        weights.grad = SCALE * gradient
        plain.step()
        state = plain.state[weights]
        for key in ("exp_avg", "exp_avg_sq") if moments == "bf16" else ():
            state[key] = state[key].to(BF16).to(FP32)
    return [weights.detach(), state["exp_avg"], state["exp_avg_sq"]]


def update_with_kernel(numel: int, moments: Any, device: str) -> list[Tensor]:
    """The same by the kernel, and the bf16 weights."""
    adam, weights = start(numel, moments, device)
    rounded = torch.zeros(numel, dtype=BF16, device=device)
    with torch.no_grad():
        for gradient in gradients(numel, device):
            weights.grad = gradient.clone()
            adam._step_in_one_pass(weights, adam.param_groups[0], SCALE, rounded)
            assert torch.equal(weights.grad, gradient)
    state = adam.state[weights]
    assert float(state["step"]) == STEPS
    return [weights.detach(), state["exp_avg"], state["exp_avg_sq"], rounded]


def check_kernel(numel: int, moments: Any, device: str, *, rounds_to_nearest: bool) -> None:
    """The kernel against torch. fp32 results differ in their last bits. Where that moves a bf16 moment to the next
    value, or rounding is not to the nearest, an update differs by as much."""
    plain = update_plainly(numel, moments, device)
    weights, mean, square, rounded = update_with_kernel(numel, moments, device)
    gap, size = 2**-6 if moments == "bf16" else 1e-5, SCALE * sizes(numel, device)
    # Six roundings of a weight may differ by half a unit in its last place each, and one more while it grows.
    assert ((weights - plain[0]).abs() <= RATE * gap + 1e-6 * plain[0].abs()).all()
    for found, expected, unit in zip((mean, square), plain[1:], (size, size.square()), strict=True):
        assert found.dtype == {"fp32": FP32, "bf16": BF16}[moments]
        assert ((found.float() - expected).abs() <= gap * unit).all()
        if moments == "bf16" and rounds_to_nearest:
            assert (found.float() != expected).double().mean() < 1e-3
    if rounds_to_nearest:
        assert torch.equal(rounded, weights.to(BF16))
    else:
        torch.testing.assert_close(rounded.float(), weights, rtol=2**-7, atol=0.0)
