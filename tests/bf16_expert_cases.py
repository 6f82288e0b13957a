"""Experts in one function of autograd against the same experts one operation at a time."""

from collections.abc import Callable

import torch
from support import small_model
from torch import Tensor

from model.experts import RoutedExperts, RoutedRows, sort_by_expert
from model.fused_experts import Products, fused_experts
from model.linear import WeightGradients
from model.permute import Copies
from model.recompute import Execution

MakeProducts = Callable[[Copies, Tensor], Products]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_EXPERTS = 8


def random_choice(num_tokens: int, num_choices: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1)[:, :num_choices]


SIZES = [(256, 128), (192, 64)]
CHOICES = {
    "random": random_choice(150, 3),
    "one token": random_choice(1, 2),
    "one expert takes everything": torch.full((70, 1), 6),
    "most experts are empty": torch.tensor([[7, 2]] * 40),
    "some choices are elsewhere": torch.where(random_choice(150, 3) < 4, random_choice(150, 3), -1),
}
# More rows than an interpreter takes quickly: as many as QuACK's are filled up to, and more.
LARGE = {"one filling": random_choice(512, 2), "many rows": random_choice(700, 3)}


def make_experts(hidden: int, inner: int, dtype: torch.dtype) -> RoutedExperts:
    model = small_model(hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=NUM_EXPERTS)
    experts = RoutedExperts(model, NUM_EXPERTS, Execution()).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return experts


def one_at_a_time(
    experts: RoutedExperts, x: Tensor, weights: Tensor, choice: Tensor, grad: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The result and gradients of x, weights and both matrices by a loop over experts, in fp64; and what gradients of
    weights, which are scalar products, can be at most."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weights, *experts.parameters())]
    rows, scales, gate_up_proj, down_proj = leaves
    out, largest = torch.zeros_like(rows), torch.zeros_like(scales)
    for expert in range(NUM_EXPERTS):
        token, number = (choice == expert).nonzero(as_tuple=True)
        gate, up = (rows[token] @ gate_up_proj[expert].t()).chunk(2, dim=-1)
        result = (torch.nn.functional.silu(gate) * up) @ down_proj[expert].t()
        out = out.index_add(0, token, result * scales[token, number].unsqueeze(-1))
        largest[token, number] = result.detach().norm(dim=1) * grad[token].double().norm(dim=1)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)], largest  # type: ignore[misc]


def check_fused_experts(
    products: MakeProducts,
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    *,
    sizes: tuple[int, int] = SIZES[0],
    packs: bool = False,
) -> None:
    """Twice into the same sums, of which the first time takes the place of what was there; and later; and without. With
    `packs` the result alone is so close."""
    choice = (CHOICES | LARGE)[name].to(DEVICE)
    experts = make_experts(*sizes, dtype)
    matrices = experts.gate_up_proj, experts.down_proj
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(len(choice), sizes[0], generator=generator).to(DEVICE, dtype) for _ in range(2))
    weights = torch.rand(choice.shape, generator=generator).to(DEVICE)
    expected, largest = one_at_a_time(experts, x, weights, choice, grad)
    copies, counts = sort_by_expert(RoutedRows(x, choice, weights, bool((choice >= 0).all())), NUM_EXPERTS)

    def run(later: WeightGradients) -> list[Tensor]:
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = fused_experts(*inputs, matrices, products(copies, counts), copies, later, packs=packs)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in inputs)]  # type: ignore[misc]

    def compare(found: list[Tensor], factor: float) -> None:
        for number, (ours, right) in enumerate(zip(found, expected, strict=True)):
            right = right * (factor if number > 2 else 1.0)
            size = largest if number == 2 else right
            allowed = max(tolerance, 0.05 if packs and number else 0.0)
            assert (ours.double() - right).norm() <= allowed * size.norm() + 1e-12, number

    at_once = run(WeightGradients())
    compare([*at_once, *(matrix.grad for matrix in matrices)], 1.0)  # type: ignore[misc]
    for matrix in matrices:
        matrix.grad = None
        matrix.main_grad = torch.full(matrix.shape, torch.nan, device=DEVICE)
        matrix.main_grad_is_old = True
    later, sums = WeightGradients(), []
    for _ in range(2):
        later.deferring = True
        again = run(later)
        assert all(torch.equal(a, b) for a, b in zip(at_once, again, strict=True))
        for work in later.take():
            work()
        sums.append([matrix.main_grad.clone() for matrix in matrices])
    assert all(torch.equal(2 * once, twice) for once, twice in zip(*sums, strict=True))
    compare([*again, *(matrix.main_grad for matrix in matrices)], 2.0)
