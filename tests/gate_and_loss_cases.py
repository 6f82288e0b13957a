"""The kernels of the gate and of the loss against plain torch, at sizes that the caller chooses: few under Triton's
interpreter, real ones on a GPU. Each check returns what the kernels gave, to be compared with another run of the same.
"""

from typing import Any

import torch
from kernel_cases import DEVICE, random
from support import small_model
from torch import Tensor, nn
from torch.nn import functional as F

from model import router
from model.config import ModelConfig
from model.loss import cross_entropy
from model.router import Route, sequence_balance_loss

GATES: dict[str, dict[str, Any]] = {
    "groups": {},
    "all groups": {"topk_group": 4},
    "softmax": {"scoring_func": "softmax"},
    "odd": {"n_routed_experts": 21, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "odd, one group": {"n_routed_experts": 11, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "dsv3_2b": {"n_routed_experts": 64, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6},
    "dsv3_671b": {"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
}


def draw_logits(kind: str, num_tokens: int, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [T, E] and a bias [E]. Where values are few, choices meet ties."""
    shape = num_tokens, config.n_routed_experts
    logits, bias = random(*shape, dtype=dtype), (4 * random(shape[1], seed=1)).round() / 64
    if kind == "few values":
        return logits.round(), bias.round()
    if kind == "equal":
        return torch.zeros_like(logits), torch.zeros_like(bias)
    if kind == "one takes all":
        bias[shape[1] // 2] = 100.0
    else:
        assert kind == "even"
    return logits, bias


def check_gate(config: ModelConfig, shape: tuple[int, int], dtype: torch.dtype, kind: str) -> list[Tensor]:
    """The whole gate over sequences of [B, S] tokens; the weight is one, so that logits are known exactly."""
    num_tokens = shape[0] * shape[1]
    logits, bias = draw_logits(kind, num_tokens, config, dtype)
    x, weight = logits.requires_grad_(), nn.Parameter(torch.eye(config.n_routed_experts, dtype=dtype, device=DEVICE))
    ours = Route(*router._KernelGate.apply(x, weight, bias, config, shape[0], None))
    exact = logits.detach().double().requires_grad_()
    expected = router.route(logits.detach().float(), bias, config, shape[0])
    check_choice(ours, expected)

    scores = exact.sigmoid() if config.scoring_func == "sigmoid" else exact.softmax(-1)
    weights = scores.gather(-1, ours.experts)
    if config.scoring_func == "sigmoid":
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * config.routed_scaling_factor
    balance_loss = sequence_balance_loss(scores.unflatten(0, shape), num_chosen=config.num_experts_per_tok)
    assert ours.weights.dtype == ours.balance_loss.dtype == torch.float32
    torch.testing.assert_close(ours.weights.double(), weights, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ours.balance_loss.double(), balance_loss, rtol=2e-6, atol=0)

    grad = random(num_tokens, config.num_experts_per_tok, seed=2)
    for route_weights, loss in ((ours.weights, ours.balance_loss), (weights, balance_loss)):
        ((route_weights * grad).sum() + num_tokens * loss).backward()
    grad_logits = exact.grad
    assert x.grad is not None
    assert weight.grad is not None
    assert grad_logits is not None
    rtol = 2e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(x.grad.double(), grad_logits, rtol=rtol, atol=1e-6)
    grad_weight = grad_logits.t() @ logits.detach().double()
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=rtol, atol=2e-6 * float(grad_weight.abs().max()))
    return [*(tensor.detach() for tensor in ours), x.grad, weight.grad]


def check_choice(ours: Route, expected: Route) -> None:
    """Of very many tokens a few may have affinities so near that the last bit of a sigmoid decides."""
    differs = (ours.experts != expected.experts).any(-1)
    assert int(differs.sum()) <= len(differs) // 10000
    load = torch.bincount(ours.experts.flatten(), minlength=len(ours.load))
    torch.testing.assert_close(ours.load, load, rtol=0, atol=0)


def check_token_losses(num_tokens: int, vocab_size: int, dtype: torch.dtype, scale: float) -> list[Tensor]:
    """Loss and gradient of single tokens, of logits that are `scale` large."""
    from model.kernels.cross_entropy import losses_and_gradient, token_losses

    logits = (scale * random(num_tokens, vocab_size + 16)).to(dtype)[:, :vocab_size]
    generator = torch.Generator(DEVICE).manual_seed(1)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=DEVICE)
    labels[0], labels[-1] = 0, vocab_size - 1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() / num_tokens, exact)
    losses, gradients = token_losses(logits, labels), logits.clone()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6 * scale)
    again = losses_and_gradient(gradients, labels, 1.0 / num_tokens)
    torch.testing.assert_close(again, losses, rtol=0, atol=0)
    # The interpreter cuts off where a GPU rounds.
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7 if DEVICE.type == "cpu" else 2.0**-8
    torch.testing.assert_close(gradients.double(), gradient, rtol=rtol, atol=2e-6 / num_tokens)
    return [losses, gradients]


def check_cross_entropy(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, chunk_size: int
) -> list[Tensor]:
    """The whole loss against fp64, no further from it than autograd through logits in `dtype`."""
    hidden = random(num_tokens, hidden_size, dtype=dtype).requires_grad_()
    weight = (random(vocab_size, hidden_size, seed=1) / hidden_size**0.5).to(dtype).requires_grad_()
    generator = torch.Generator(DEVICE).manual_seed(2)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=DEVICE)
    inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(*inputs), labels)
    exact_gradients = torch.autograd.grad(exact / 3, inputs)
    ours = cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    gradients = torch.autograd.grad(ours / 3, (hidden, weight))
    plain = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    plain_gradients = torch.autograd.grad(plain / 3, (hidden, weight))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6 if dtype == torch.float32 else 1e-4, atol=0)
    for found, other, wanted in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert found.dtype == dtype
        error, other_error = (float((each.double() - wanted).norm() / wanted.norm()) for each in (found, other))
        # What comes of one more rounding, by the third that the backward pass brings.
        assert error <= 1.25 * other_error + 1e-6, (error, other_error)
    return [ours.detach(), *gradients]


def gate_config(name: str) -> ModelConfig:
    """A model with one of `GATES`."""
    return small_model(**GATES[name])
