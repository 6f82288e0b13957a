"""The router against plain loops, ties included, and what the bias may and may not touch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_model
from torch import Tensor

from model import router
from model.router import Gate, choose_experts, sequence_balance_loss, update_bias

torch.set_num_threads(1)


def reference_choice(scores: list[float], num_experts: int, num_groups: int, num_chosen_groups: int) -> list[int]:
    """The rule of the report for one token, written out."""
    size = len(scores) // num_groups
    group_scores = []
    for group in range(num_groups):
        members = sorted(scores[group * size : (group + 1) * size], reverse=True)
        group_scores.append(sum(np.float32(member) for member in members[:2]))
    best_groups = sorted(range(num_groups), key=lambda group: (-group_scores[group], group))[:num_chosen_groups]
    candidates = [expert for expert in range(len(scores)) if expert // size in best_groups]
    return sorted(candidates, key=lambda expert: (-scores[expert], expert))[:num_experts]


def assert_choice(scores: Tensor, num_experts: int, num_groups: int, num_chosen_groups: int) -> None:
    chosen = choose_experts(scores, num_experts=num_experts, num_groups=num_groups, num_chosen_groups=num_chosen_groups)
    expected = [reference_choice(row, num_experts, num_groups, num_chosen_groups) for row in scores.tolist()]
    assert chosen.tolist() == expected


@st.composite
def routings(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[Tensor, int, int, int]:
    num_groups = draw(st.integers(1, 5))
    size = draw(st.integers(2, 5))
    num_chosen_groups = draw(st.integers(1, num_groups))
    num_experts = draw(st.integers(1, num_chosen_groups * size))
    num_tokens = draw(st.integers(1, 4))
    row = st.lists(values, min_size=num_groups * size, max_size=num_groups * size)
    rows = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    return torch.tensor(rows), num_experts, num_groups, num_chosen_groups


@settings(max_examples=300, deadline=None)
@given(routings(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])))
def test_choice_with_many_ties(routing: tuple[Tensor, int, int, int]) -> None:
    assert_choice(*routing)


@settings(max_examples=200, deadline=None)
@given(routings(st.floats(-2, 2, width=32)))
def test_choice_with_any_scores(routing: tuple[Tensor, int, int, int]) -> None:
    assert_choice(*routing)


def test_equal_scores_go_to_the_lower_index() -> None:
    chosen = choose_experts(torch.full((3, 12), 0.5), num_experts=4, num_groups=3, num_chosen_groups=2)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 3


def test_groups_are_ranked_by_their_two_best() -> None:
    # Group 0 has the best expert, group 1 the best pair.
    scores = torch.tensor([[0.9, 0.1, 0.0, 0.6, 0.6, 0.0]])
    chosen = choose_experts(scores, num_experts=2, num_groups=2, num_chosen_groups=1)
    assert chosen.tolist() == [[3, 4]]


def test_another_tie_rule_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def higher_index_wins(values: Tensor, count: int) -> Tensor:
        flipped = values.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return values.shape[-1] - 1 - flipped

    scores = torch.tensor([[0.3, 0.9, 0.9, 0.2]])
    assert_choice(scores, 1, 1, 1)
    monkeypatch.setattr(router, "_best", higher_index_wins)
    with pytest.raises(AssertionError):
        assert_choice(scores, 1, 1, 1)


def make_gate(scoring_func: str = "sigmoid", *, seed: int = 0) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(small_model(scoring_func=scoring_func))
    gate.weight.data = torch.randn(gate.weight.shape, generator=generator) * 0.2
    gate.e_score_correction_bias.copy_(torch.randn(8, generator=generator) * 0.1)
    return gate


def random_input(num_tokens: int, *, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_gate_against_plain_loops(scoring_func: str) -> None:
    gate, x = make_gate(scoring_func), random_input(20)
    route = gate(x.view(2, 10, -1))
    assert route.weights.dtype == torch.float32
    load, all_scores = [0] * 8, []
    for token in range(20):
        logits = [float(x[token].double() @ gate.weight[expert].detach().double()) for expert in range(8)]
        if scoring_func == "sigmoid":
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        else:
            scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        biased = [score + float(bias) for score, bias in zip(scores, gate.e_score_correction_bias, strict=True)]
        chosen = reference_choice(biased, 2, 4, 2)
        total = sum(scores[expert] for expert in chosen) if scoring_func == "sigmoid" else 1.0
        weights = [2.5 * scores[expert] / total for expert in chosen]
        assert route.experts[token].tolist() == chosen
        torch.testing.assert_close(route.weights[token], torch.tensor(weights), atol=1e-6, rtol=0)
        all_scores.append(scores)
        for expert in chosen:
            load[expert] += 1
    assert route.load.tolist() == load
    expected_loss = reference_balance_loss(torch.tensor(all_scores).view(2, 10, 8), 2)
    torch.testing.assert_close(route.balance_loss, expected_loss, atol=1e-6, rtol=0)


def test_weights_sum_to_the_scaling_factor() -> None:
    torch.testing.assert_close(make_gate()(random_input(50)[None]).weights.sum(-1), torch.full((50,), 2.5))


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    gate, x = make_gate(), random_input(50)
    gate.e_score_correction_bias.zero_()
    plain = gate(x[None])
    gate.e_score_correction_bias[5] = 10.0
    steered = gate(x[None])
    assert (steered.experts == 5).any(-1).all()
    assert not (plain.experts == 5).any(-1).all()
    assert torch.equal(plain.balance_loss, steered.balance_loss)
    unbiased = (x @ gate.weight.t()).sigmoid().gather(-1, steered.experts)
    torch.testing.assert_close(steered.weights, 2.5 * unbiased / unbiased.sum(-1, keepdim=True))


def test_gradient_does_not_know_the_bias() -> None:
    gate, x = make_gate(), random_input(50)
    gradients, routes = [], []
    for shift in (0.0, 0.75):  # the same for all experts: the same choice
        gate.e_score_correction_bias.fill_(shift)
        gate.zero_grad()
        route = gate(x[None])
        (route.weights.square().sum() + route.balance_loss).backward()
        routes.append(route.experts)
        gradients.append(gate.weight.grad.clone())
    assert torch.equal(*routes)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
    assert "e_score_correction_bias" not in dict(gate.named_parameters())
    assert gate.e_score_correction_bias.grad is None


def test_gate_scores_in_fp32_whatever_the_input() -> None:
    gate, x = make_gate().bfloat16(), random_input(30).bfloat16()
    gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    exact = Gate(gate.config)
    exact.weight.data = gate.weight.data.float()
    exact.e_score_correction_bias.copy_(gate.e_score_correction_bias)
    assert torch.equal(gate(x[None]).weights, exact(x[None].float()).weights)


def test_gradients_in_bf16_are_those_of_fp32_rounded_once() -> None:
    gate, x = make_gate().bfloat16(), random_input(30).bfloat16()[None].requires_grad_()
    gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    exact, exact_x = Gate(gate.config), x.detach().float().requires_grad_()
    exact.weight.data = gate.weight.data.float()
    exact.e_score_correction_bias.copy_(gate.e_score_correction_bias)
    for module, inputs in ((gate, x), (exact, exact_x)):
        route = module(inputs)
        (route.weights.square().sum() + route.balance_loss).backward()
    assert torch.equal(x.grad, exact_x.grad.bfloat16())
    assert torch.equal(gate.weight.grad, exact.weight.grad.bfloat16())


class Part:
    """One of two processes; what they have to sum is worked out before."""

    size = 2

    def __init__(self, place: int, total: Tensor) -> None:
        self.place = place
        self._total = total

    def sum(self, counts: Tensor) -> Tensor:
        assert (counts <= self._total).all()
        return self._total


def test_the_balance_loss_of_a_sequence_is_the_mean_over_its_parts() -> None:
    gate, x = make_gate(), random_input(40).view(2, 20, 32)
    best = (x @ gate.weight.t()).sigmoid().topk(2).indices
    total = torch.zeros(2, 8).scatter_add_(1, best.flatten(1), torch.ones(2, 40))
    losses = [gate(half, Part(place, total)).balance_loss for place, half in enumerate(x.chunk(2, dim=1))]
    torch.testing.assert_close(torch.stack(losses).mean(), gate(x).balance_loss)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.floats(1e-4, 0.5))
def test_bias_update_against_plain_loops(load: list[int], speed: float) -> None:
    bias = torch.linspace(-1, 1, len(load))
    expected = []
    for old, tokens in zip(bias.tolist(), load, strict=True):
        mean = sum(load) / len(load)
        expected.append(old + speed * ((tokens < mean) - (tokens > mean)))
    update_bias(bias, torch.tensor(load), speed)
    torch.testing.assert_close(bias, torch.tensor(expected), atol=1e-6, rtol=0)


def test_bias_update_of_several_layers_at_once() -> None:
    bias = torch.zeros(2, 3)
    update_bias(bias, torch.tensor([[9, 0, 3], [4, 4, 4]]), 0.5)
    torch.testing.assert_close(bias, torch.tensor([[-0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]))


def test_bias_update_sees_one_token_in_a_large_batch() -> None:
    load = torch.full((4,), 2**40)
    load[3] += 1
    bias = torch.zeros(4)
    update_bias(bias, load, 1.0)
    assert bias.tolist() == [1.0, 1.0, 1.0, -1.0]


def reference_balance_loss(scores: Tensor, num_chosen: int) -> Tensor:
    """Equations 17 to 20 of the report, per sequence, with autograd through P only."""
    losses = []
    num_positions, num_experts = scores.shape[1:]
    for sequence in scores:
        loss = torch.zeros(())
        chosen = [reference_choice(row, num_chosen, 1, 1) for row in sequence.tolist()]
        for expert in range(num_experts):
            frequency = num_experts / (num_chosen * num_positions) * sum(expert in best for best in chosen)
            probability = sum(row[expert] / row.sum() for row in sequence) / num_positions
            loss = loss + frequency * probability
        losses.append(loss)
    return sum(losses) / len(losses)


def test_balance_loss_and_its_gradient_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 7, 5, generator=generator).round(decimals=1).clamp_min(0.1)  # with ties
    left, right = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    ours, expected = sequence_balance_loss(left, num_chosen=2), reference_balance_loss(right, 2)
    torch.testing.assert_close(ours, expected)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(left.grad, right.grad)


def test_balance_loss_is_one_when_balanced_and_larger_when_not() -> None:
    balanced = torch.eye(4)[None] + 0.01
    torch.testing.assert_close(sequence_balance_loss(balanced, num_chosen=1), torch.tensor(1.0))
    skewed = torch.tensor([1.0, 0.01, 0.01, 0.01]).expand(1, 4, 4)
    assert sequence_balance_loss(skewed, num_chosen=1) > 3.5


def test_thousand_bias_updates_balance_a_skewed_router() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = Gate(small_model(n_routed_experts=16, num_experts_per_tok=2, n_group=1, topk_group=1))
    gate.weight.data = torch.randn(16, 32, generator=generator) * 0.05
    gate.weight.data[:, 0] += torch.linspace(-1.0, 1.0, 16)  # the first input is always 1: a liking of its own
    probe = random_input(64)
    gate(probe[None]).weights.square().sum().backward()
    gradient = gate.weight.grad.clone()

    violations = []
    for _ in range(1000):
        x = torch.randn(512, 32, generator=generator)
        x[:, 0] = 1.0
        load = gate(x[None]).load
        violations.append(float(load.max() / load.float().mean() - 1))
        update_bias(gate.e_score_correction_bias, load, 0.001)
    assert violations[0] > 2
    assert np.mean(violations[-50:]) < 0.3
    assert torch.equal(gate.weight.grad, gradient)
    assert not gate.e_score_correction_bias.requires_grad
