"""The routed experts against a loop over tokens, and the copies of rows that they are made of."""

from typing import Any

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.nn import functional as F

from model.experts import RoutedExperts, RoutedRows, SwiGLU, fused_in, sort_by_expert, swiglu
from model.fp8 import PARTS_ON_GPU, Fp8Config
from model.linear import WeightGradients, grouped_linear
from model.permute import _Spread, collect, find_copies, pick, spread
from model.recompute import Execution, Recompute

torch.set_num_threads(1)

NUM_EXPERTS = 8


def make_experts() -> RoutedExperts:
    experts = RoutedExperts(small_model(), NUM_EXPERTS, Execution())
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
    "some choices are elsewhere": torch.where(random_choice(23, 3) < 4, random_choice(23, 3), -1),
    "all choices are elsewhere": torch.full((23, 2), -1),
}


def loop_over_tokens(experts: RoutedExperts, x: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
    rows = []
    for token in range(len(x)):
        out = x[token] * 0.0
        for k, expert in enumerate(choice[token].tolist()):
            if expert < 0:
                continue
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            out = out + weights[token, k] * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows) if rows else x * 1.0


def all_at_once(experts: RoutedExperts, x: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
    routed = RoutedRows(x, choice, weights, complete=bool((choice >= 0).all()))
    _, counts = sort_by_expert(routed, NUM_EXPERTS)
    assert counts.tolist() == [int((choice == expert).sum()) for expert in range(NUM_EXPERTS)]
    return experts(routed)


@pytest.mark.parametrize("case", CHOICES)
def test_experts_against_a_loop(case: str) -> None:
    choice, experts = CHOICES[case], make_experts()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(choice), 32, generator=generator)
    weights = torch.rand(choice.shape, generator=generator)
    toward = torch.randn(len(choice), 32, generator=generator)
    results = []
    for compute in (loop_over_tokens, all_at_once):
        experts.zero_grad()
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = compute(experts, *inputs, choice)
        (out * toward).sum().backward()
        gradients = [tensor.grad for tensor in (*inputs, *experts.parameters())]
        results.append([out, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)])
    for expected, ours in zip(*results, strict=True):
        if (choice >= 0).any():
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        else:
            assert not ours.any()
    assert results[1][0].shape == x.shape


@pytest.mark.parametrize("case", CHOICES)
def test_deferred_weight_gradients_are_the_same(case: str) -> None:
    choice, gradients = CHOICES[case], []
    for deferring in (False, True):
        experts = make_experts()
        experts._execution.weight_gradients.deferring = deferring
        x = torch.randn(len(choice), 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
        all_at_once(experts, x, torch.ones(choice.shape), choice).square().sum().backward()
        assert all((p.grad is None) == deferring for p in experts.parameters())
        for work in experts._execution.weight_gradients.take():
            work()
        gradients.append([x.grad, *(p.grad for p in experts.parameters())])
    for at_once, later in zip(*gradients, strict=True):
        assert torch.equal(at_once, later)


def test_tokens_of_one_expert_stay_in_order() -> None:
    choice = CHOICES["random"]
    copies, counts = sort_by_expert(RoutedRows(torch.zeros(23, 1), choice, choice.float()), NUM_EXPERTS)
    for part in copies.tokens.split(counts.tolist()):
        assert part.tolist() == sorted(part.tolist())


class _WrongSpread(_Spread):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots = ctx.copies.slots.flip(0)
        return grad.index_select(0, slots.flatten()).unflatten(0, slots.shape).sum(1), None


@pytest.mark.parametrize("num_copies", [1, 3])
def test_gradient_of_spreading(num_copies: int) -> None:
    slots = torch.randperm(5 * num_copies, generator=torch.Generator().manual_seed(0)).view(5, num_copies)
    copies = find_copies(slots, 5 * num_copies, complete=True)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread(x, copies), x, eps=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: _WrongSpread.apply(x, copies), x, eps=1e-3, atol=1e-4)


def test_copies_that_are_missing_are_zero() -> None:
    copies = find_copies(torch.tensor([[1, 3], [0, 2], [3, 3]]), 3, complete=False)
    rows = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    sums = collect(rows, copies)
    assert sums[:, 0].tolist() == [2, 5, 0]
    sums.backward(torch.tensor([[8.0], [16.0], [32.0]]))
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [16, 8, 16]
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]], requires_grad=True)
    picked = pick(values, copies)
    assert picked.tolist() == [2, 1, 3]
    picked.backward(torch.tensor([4.0, 5.0, 6.0]))
    assert values.grad is not None
    assert values.grad.tolist() == [[5, 0], [4, 6], [0, 0]]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_swiglu(weighted: bool) -> None:
    gate_up, grad = torch.randn(7, 10, requires_grad=True), torch.randn(7, 5)
    weights = torch.rand(7, requires_grad=True) if weighted else None
    swiglu(gate_up, weights).backward(grad)
    other, of_rows = gate_up.detach().clone().requires_grad_(), torch.ones(7, requires_grad=True)
    if weights is not None:
        of_rows = weights.detach().clone().requires_grad_()
    gate, up = other.chunk(2, -1)
    (gate * gate.sigmoid() * up * of_rows[:, None]).backward(grad)
    torch.testing.assert_close(gate_up.grad, other.grad)
    if weights is not None:
        torch.testing.assert_close(weights.grad, of_rows.grad)


def test_sums_over_copies_are_in_fp32() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    copies = find_copies(torch.tensor([[0, 1, 2]]), 3, complete=True)
    assert collect(rows, copies).item() == 258  # in bf16, 256 + 1 is 256
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    spread(x, copies).backward(rows)
    assert x.grad is not None
    assert x.grad.item() == 258


def test_grouped_linear_uses_the_weight_of_each_row() -> None:
    weight = torch.nn.Parameter(torch.arange(3.0)[:, None, None].expand(3, 2, 4))
    out = grouped_linear(torch.ones(5, 4), weight, torch.tensor([2, 0, 3]), WeightGradients())
    assert out[:, 0].tolist() == [0.0, 0.0, 8.0, 8.0, 8.0]


def test_swiglu_takes_the_gate_first() -> None:
    mlp = SwiGLU(2, 1, Execution())
    mlp.gate_up_proj.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mlp.down_proj.weight.data = torch.ones(2, 1)
    x = torch.tensor([3.0, 5.0])
    torch.testing.assert_close(mlp(x), (F.silu(x[0]) * x[1]).expand(2))


@pytest.mark.parametrize("recomputed", [frozenset(), frozenset({"swiglu"})], ids=["", "computed again"])
@pytest.mark.parametrize("module", ["dense", "routed"])
def test_inputs_of_swiglu_kept_in_fp8(module: str, recomputed: frozenset[str]) -> None:
    """The result is the same, and gradients are close: all of a bit that a code has lost. Nothing wider is kept."""
    config = small_model(hidden_size=64, moe_intermediate_size=96)
    kept: dict[bool, int] = {}
    found: dict[bool, list[Tensor]] = {}
    for packs in (False, True):
        execution = Execution(recompute=Recompute(recomputed), packs_swiglu=packs)
        generator = torch.Generator().manual_seed(0)
        mlp = SwiGLU(64, 96, execution) if module == "dense" else RoutedExperts(config, NUM_EXPERTS, execution)
        for parameter in mlp.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
        x = torch.randn(50, 64, generator=generator).requires_grad_()
        weights = torch.rand(50, 3, generator=generator).requires_grad_()
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        inputs = x if module == "dense" else RoutedRows(x, random_choice(50, 3), weights)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept), execution.recompute.region():
            out = mlp(inputs)
        out.sum().backward()
        used = [x, *mlp.parameters()] if module == "dense" else [x, weights, *mlp.parameters()]
        kept[packs], found[packs] = sum(sizes), [out.detach(), *(leaf.grad for leaf in used)]  # type: ignore[misc]
    assert torch.equal(found[False][0], found[True][0])
    for exact, packed in zip(found[False], found[True], strict=True):
        assert (exact - packed).norm() < 0.05 * exact.norm()
    if not recomputed:
        rows = 50 if module == "dense" else 150
        assert kept[False] - kept[True] == rows * (4 * 192 - 2 * (128 + 4))


@pytest.mark.parametrize(
    ("hidden", "inner", "fp8", "watched", "path"),
    [
        (64, 8, Fp8Config(), True, "bf16"),
        (256, 128, Fp8Config(recipe="block", parts=PARTS_ON_GPU), True, "bf16"),
        (256, 8, Fp8Config(recipe="block"), False, "bf16"),
        (256, 128, Fp8Config(recipe="block"), False, "fp8"),
        (256, 128, Fp8Config(recipe="block"), True, None),
        (256, 64, Fp8Config(recipe="block"), False, None),
        (256, 128, Fp8Config(recipe="current"), False, None),
    ],
)
def test_which_experts_are_one_function_on_a_gpu(
    hidden: int, inner: int, fp8: Fp8Config, watched: bool, path: str | None
) -> None:
    config = small_model(hidden_size=hidden, moe_intermediate_size=inner)
    assert fused_in(config, torch.bfloat16, fp8, watched=watched) == path
    assert fused_in(config, torch.float32, fp8, watched=watched) is None
