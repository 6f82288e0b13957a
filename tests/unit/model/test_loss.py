"""The loss and its gradients, made in the forward pass, against those of torch."""

from collections.abc import Callable

import pytest
import torch
from gate_and_loss_cases import check_cross_entropy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import loss
from model.loss import cross_entropy

torch.set_num_threads(1)

VOCABULARY = 11


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """States [3, 7, D], a weight [V, D] and labels [3, 7]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 5, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(VOCABULARY, (3, 7), generator=generator)


def plainly(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 100])
def test_cross_entropy_against_torch(chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    ours, expected = cross_entropy(hidden, weight, labels, chunk_size=chunk_size), plainly(hidden, weight, labels)
    torch.testing.assert_close(ours, expected)
    for mine, other in zip(
        torch.autograd.grad(2.5 * ours, (hidden, weight)),
        torch.autograd.grad(2.5 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, labels, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("vocab_size", [96, 257, 2048])
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_against_fp64(dtype: torch.dtype, chunk_size: int, vocab_size: int) -> None:
    check_cross_entropy(64, vocab_size, 32, dtype, chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_one_input_needs_a_gradient(frozen: str, chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    moving, other = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    expected = torch.autograd.grad(plainly(hidden, weight, labels), moving)
    other.requires_grad_(False)
    cross_entropy(hidden, weight, labels, chunk_size=chunk_size).backward()
    assert other.grad is None
    torch.testing.assert_close(moving.grad, *expected)


def test_a_weight_that_is_used_twice() -> None:
    hidden, weight, labels = make_inputs()

    def both(one: Callable[..., Tensor]) -> Tensor:
        return 0.3 * one(hidden, weight, labels) + 0.7 * one(2 * hidden, weight, labels.flip(0))

    ours = both(lambda *inputs: cross_entropy(*inputs, chunk_size=8))
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(both(plainly), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_two_backward_passes_and_one_recomputed() -> None:
    hidden, weight, labels = make_inputs()
    kept = cross_entropy(hidden, weight, labels, chunk_size=8)
    first = torch.autograd.grad(kept, (hidden, weight), retain_graph=True)
    again = checkpoint(lambda hidden: cross_entropy(hidden, weight, labels, chunk_size=8), hidden, use_reentrant=False)
    for gradients in (torch.autograd.grad(kept, (hidden, weight)), torch.autograd.grad(again, (hidden, weight))):
        assert all(map(torch.equal, first, gradients))


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the labels' own gradient is left out."""

    def wrong(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
        losses = loss.token_losses(logits, labels)
        logits.copy_(logits.softmax(-1) * scale)
        return losses

    monkeypatch.setattr(loss, "losses_and_gradient", wrong)
    with pytest.raises(AssertionError):
        check_cross_entropy(64, 96, 32, torch.float32, 16)
