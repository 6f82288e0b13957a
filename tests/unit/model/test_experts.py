"""Dispatch, experts and combination against a loop over tokens."""

from typing import Any

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.nn import functional as F

from model.experts import GroupedExperts, LocalDispatcher, SwiGLU, _inverse, _Permute, grouped_linear
from model.router import Route

torch.set_num_threads(1)

NUM_EXPERTS = 8


def make_experts() -> GroupedExperts:
    experts = GroupedExperts(small_model(), NUM_EXPERTS)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return experts


def random_choice(num_tokens: int, num_choices: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1)[:, :num_choices]


CHOICES = {
    "random": random_choice(23, 3),
    "one choice": random_choice(23, 1),
    "all experts": random_choice(5, NUM_EXPERTS),
    "one expert takes everything": torch.full((23, 1), 6),
    "most experts are empty": torch.tensor([[7, 2]] * 23),
    "one token": random_choice(1, 2),
    "no token": random_choice(0, 2),
}


def loop_over_tokens(experts: GroupedExperts, x: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
    rows = []
    for token in range(len(x)):
        out = torch.zeros(x.shape[1])
        for k, expert in enumerate(choice[token].tolist()):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            out = out + weights[token, k] * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows) if rows else x * 1.0


def through_dispatcher(experts: GroupedExperts, x: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
    dispatcher = LocalDispatcher(NUM_EXPERTS)
    route = Route(choice, weights, scores=weights)
    dispatched = dispatcher.dispatch(x, route)
    assert dispatched.counts.tolist() == [int((choice == expert).sum()) for expert in range(NUM_EXPERTS)]
    return dispatcher.combine(experts(dispatched.rows, dispatched.counts), dispatched, route)


@pytest.mark.parametrize("case", CHOICES)
def test_experts_against_a_loop(case: str) -> None:
    choice, experts = CHOICES[case], make_experts()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(choice), 32, generator=generator)
    weights = torch.rand(choice.shape, generator=generator)
    toward = torch.randn(len(choice), 32, generator=generator)
    results = []
    for compute in (loop_over_tokens, through_dispatcher):
        experts.zero_grad()
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = compute(experts, *inputs, choice)
        (out * toward).sum().backward()
        gradients = [tensor.grad for tensor in (*inputs, *experts.parameters())]
        results.append([out, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)])
    for expected, ours in zip(*results, strict=True):
        if len(choice):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        else:
            assert not ours.any()
    assert results[1][0].shape == x.shape


def test_tokens_of_one_expert_stay_in_order() -> None:
    choice = CHOICES["random"]
    x = torch.arange(len(choice)).float()[:, None]
    dispatched = LocalDispatcher(NUM_EXPERTS).dispatch(x, Route(choice, choice.float(), choice.float()))
    for part in dispatched.rows.flatten().split(dispatched.counts.tolist()):
        assert part.tolist() == sorted(part.tolist())


class _WrongPermute(_Permute):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order).unflatten(0, (-1, ctx.num_choices)).sum(1), None, None


@pytest.mark.parametrize("num_choices", [1, 3])
def test_gradient_of_the_permutation(num_choices: int) -> None:
    order = torch.randperm(5 * num_choices, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Permute.apply(x, order, num_choices), x)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: _WrongPermute.apply(x, order, num_choices), x)


def test_inverse_of_a_permutation() -> None:
    order = torch.randperm(20)
    assert torch.equal(order[_inverse(order)], torch.arange(20))


def test_combination_sums_in_fp32() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    choice = torch.tensor([[0, 1, 2]])
    route = Route(choice, torch.ones(1, 3), torch.ones(1, 3))
    dispatcher = LocalDispatcher(3)
    out = dispatcher.combine(rows, dispatcher.dispatch(torch.zeros(1, 1), route), route)
    assert out.dtype == torch.bfloat16
    assert out.item() == 258  # in bf16, 256 + 1 is 256


def test_grouped_linear_uses_the_weight_of_each_row() -> None:
    weight = torch.arange(3.0)[:, None, None].expand(3, 2, 4)
    out = grouped_linear(torch.ones(5, 4), weight, torch.tensor([2, 0, 3]))
    assert out[:, 0].tolist() == [0.0, 0.0, 8.0, 8.0, 8.0]


def test_swiglu_takes_the_gate_first() -> None:
    mlp = SwiGLU(2, 1)
    mlp.gate_up_proj.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mlp.down_proj.weight.data = torch.ones(2, 1)
    x = torch.tensor([3.0, 5.0])
    torch.testing.assert_close(mlp(x), (F.silu(x[0]) * x[1]).expand(2))
