"""Gate and loss by their kernels at the sizes of training, each twice: the same to the bit."""

from collections.abc import Callable

import pytest
import torch
from gate_and_loss_cases import check_cross_entropy, check_gate, check_token_losses, gate_config
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def twice(check: Callable[[], list[Tensor]]) -> None:
    for first, second in zip(check(), check(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["even", "few values", "equal", "one takes all"])
@pytest.mark.parametrize("num_sequences", [2, 8])
@pytest.mark.parametrize("name", ["dsv3_2b", "dsv3_671b", "softmax", "odd"])
def test_gate(name: str, num_sequences: int, kind: str, dtype: torch.dtype) -> None:
    twice(lambda: check_gate(gate_config(name), (num_sequences, 4096), dtype, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [2048, 32768, 50257, 129280])
def test_token_losses(vocab_size: int, dtype: torch.dtype) -> None:
    twice(lambda: check_token_losses(512, vocab_size, dtype, 5.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1024, 4096])
@pytest.mark.parametrize("vocab_size", [32768, 50257])
def test_cross_entropy(vocab_size: int, chunk_size: int, dtype: torch.dtype) -> None:
    twice(lambda: check_cross_entropy(4096, vocab_size, 1024, dtype, chunk_size))


def test_nothing_waits_for_the_device() -> None:
    from model.loss import cross_entropy
    from model.router import Gate

    config = gate_config("dsv3_2b")
    gate = Gate(config).cuda()
    torch.nn.init.normal_(gate.weight)
    weight = torch.randn(1000, 32, device="cuda", requires_grad=True)
    hidden = torch.randn(2, 64, 32, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (2, 64), device="cuda")

    def step() -> None:
        route = gate(hidden)
        loss = cross_entropy(hidden, weight, labels, chunk_size=48)
        (route.weights.sum() + route.balance_loss + loss).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
