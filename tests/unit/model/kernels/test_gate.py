"""The kernels of the gate at small and odd sizes, among ties, and where experts get everything or nothing."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from gate_and_loss_cases import GATES, check_gate, gate_config
from kernel_cases import random
from support import small_model
from torch import Tensor, nn

from model import router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["even", "few values", "equal", "one takes all"])
@pytest.mark.parametrize("name", GATES)
def test_gate(name: str, kind: str, dtype: torch.dtype) -> None:
    check_gate(gate_config(name), (2, 19), dtype, kind)


def test_sequences_longer_than_a_program() -> None:
    check_gate(gate_config("dsv3_2b"), (3, 101), torch.bfloat16, "even")


def test_one_position() -> None:
    check_gate(gate_config("groups"), (1, 1), torch.float32, "even")


class Half:
    """One of two processes, where the other's counts are the same."""

    place, size = 0, 2

    def sum(self, counts: Tensor) -> Tensor:
        return 2 * counts


@pytest.mark.parametrize("used", ["weights", "balance_loss"])
def test_gradient_of_one_result(used: str) -> None:
    config, bias = small_model(), torch.zeros(8)
    logits = random(6, 8).requires_grad_()
    again = logits.detach().requires_grad_()
    ours = router.Route(*router._KernelGate.apply(logits, nn.Parameter(torch.eye(8)), bias, config, 2, Half()))
    plain = router.route(again, bias, config, 2, Half())  # type: ignore[arg-type]
    for route in (ours, plain):
        getattr(route, used).square().sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_terms_are_the_gradient_exactly() -> None:
    from model.kernels.gate import route_backward

    logits, grad = random(50, 8), random(50, 2, seed=1)
    experts = torch.stack((torch.zeros(50, dtype=torch.int64), torch.arange(50) % 7 + 1), dim=1)
    counts = torch.full((2, 8), 3)
    options = {"is_sigmoid": True, "factor": 2.5, "balance_factor": 0.01}
    whole, terms = (
        route_backward(grad, torch.tensor(0.5), logits, experts, counts, in_terms=in_terms, **options)  # type: ignore[arg-type]
        for in_terms in (False, True)
    )
    assert terms.shape == (50, 3, 8)
    assert torch.equal(terms.double().sum(1), whole.double())


def test_what_is_not_a_number_does_not_leave_the_experts() -> None:
    config = small_model(n_routed_experts=11, n_group=1, topk_group=1, num_experts_per_tok=3)
    x = random(9, 11)
    x[4] = float("nan")
    route = router.Route(*router._KernelGate.apply(x, nn.Parameter(torch.eye(11)), torch.zeros(11), config, 1, None))
    assert ((route.experts >= 0) & (route.experts < 11)).all()
    assert route.weights[4].isnan().all()
    assert route.weights[:4].isfinite().all()
